"""Tasks on a Ray cluster: of this machine, or one that is running on many.

Ray runs a task again when its worker or its node is lost. Nodes need this package, in the same
version, and must see the same folders; data goes through files, only requests through Ray.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from hrmtext import __version__
from hrmtext.data.engine import OnAnswer, Request, run_task
from hrmtext.data.parts import PART_BYTES
from hrmtext.data.workers import WorkerDied, reply_to, unpack
from hrmtext.errors import BackendError, DataError
from hrmtext.runtime.log import logger

MAX_RETRIES = 5
"""Times that one task's worker may be lost."""
QUEUED_PER_CPU = 4
"""Tasks that wait on the cluster for each of its cores."""
STORE_BYTES = 100_000_000
"""Ray's shared memory on a cluster of this machine; requests and answers are small."""
PROBE = ".probe."
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RayEngine:
    """Answers requests by Ray tasks of one core each."""

    def __init__(self, address: str | None = None, num_workers: int | None = None) -> None:
        """Nothing is started before there is work.

        Args:
            address: of a running cluster; None: what RAY_ADDRESS says, else one is started here.
            num_workers: processes of a cluster that is started here; None: one a core.
        """
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.num_workers = num_workers
        self._ray: Any = None
        self._folders: tuple[Path, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None

    def require(self, *, written: Sequence[Path], read: Sequence[Path]) -> None:
        """Ask every node; see `Engine.require`.

        Raises:
            DataError: one does not. BackendError: Ray is missing or the cluster out of reach.
        """
        ray = self._connected()
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        look = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(node_problem)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        with _probes(written) as probes:
            places = [str(Path.cwd()), *map(str, probes), *map(str, read)]
            answers = [
                look.options(scheduling_strategy=strategy(node["NodeID"], soft=False)).remote(
                    __version__, places
                )
                for node in nodes
            ]
            for node, answer in zip(nodes, answers, strict=True):
                try:
                    problem = self._get(answer, "looking for the folders")
                except WorkerDied:
                    alive = {other["NodeID"] for other in ray.nodes() if other["Alive"]}
                    if node["NodeID"] in alive:
                        raise
                    continue  # lost meanwhile; the others do its tasks
                if problem is not None:
                    raise DataError(f"node {node['NodeManagerAddress']} of Ray's cluster {problem}")

    def part_bytes(self, num_bytes: int) -> int:
        """32 MiB, whatever there is to read: a cluster may grow."""
        return PART_BYTES

    def ask(
        self,
        requests: Sequence[Request],
        on_answer: OnAnswer = lambda index: None,
        *,
        num_bytes: int,
    ) -> list[Any]:
        """As `Engine.ask`; the number of workers is the cluster's."""
        ray = self._connected()
        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_run)
        waiting: collections.deque[tuple[Request, int | None]] = collections.deque(
            (request, index) for index, request in enumerate(requests)
        )
        folder = str(Path.cwd())  # what relative paths in requests begin at
        answers: list[Any] = [None] * len(requests)
        running: dict[Any, tuple[Request, int | None]] = {}
        try:
            while waiting or running:
                # Asked each time: a cluster may grow.
                limit = QUEUED_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < limit:
                    request, index = waiting.popleft()
                    running[task.remote(folder, request)] = request, index
                ended, _ = ray.wait(list(running), num_returns=1)
                for reference in ended:
                    request, index = running.pop(reference)
                    answer = unpack(self._get(reference, request.get("what", "a task")))
                    if index is not None:
                        answers[index] = answer
                        further = on_answer(index)
                        if further is not None:
                            waiting.appendleft((further, None))
        except BaseException:
            for reference in running:
                ray.cancel(reference, force=True)
            raise
        return answers

    def _get(self, reference: Any, what: str) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayError as error:
            raise WorkerDied(
                f"Ray gave up {what} after its worker was lost {MAX_RETRIES + 1} times: {error}"
            ) from error

    def _connected(self) -> Any:
        if self._ray is not None:
            return self._ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            import ray.util.scheduling_strategies
        except ImportError:
            raise BackendError(
                "the engine ray needs Ray; install it: pip install 'hrm-text[distributed]', or "
                "leave the engine at local"
            ) from None
        settings: dict[str, Any] = {"address": self.address, "log_to_driver": False}
        environment = dict(ENVIRONMENT)
        if self.address == "local":
            source = str(Path(__file__).parents[2])  # workers run this very code, installed or not
            path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
            environment["PYTHONPATH"] = path
            settings |= {
                "num_cpus": self.num_workers or os.cpu_count(),
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
            }
        try:
            ray.init(
                **settings, runtime_env={"env_vars": environment}, logging_level=logging.ERROR,
                configure_logging=True, namespace=f"hrm-text-{uuid.uuid4().hex[:8]}",
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise BackendError(
                f"could not reach a Ray cluster at {self.address!r}: {error}. Is it running, and "
                "is this machine one of its nodes? Without an address one is started here"
            ) from error
        self._ray = ray
        cores = ray.cluster_resources().get("CPU", 0)
        logger.info("ray: %d nodes, %d cores", len(ray.nodes()), cores)
        return ray


def _run(folder: str, request: Request) -> dict[str, Any]:
    os.chdir(folder)
    return reply_to(run_task, request)


def node_problem(version: str, places: Sequence[str]) -> str | None:
    """What is wrong with this node, or None.

    Args:
        version: of the package on the machine that asks.
        places: files and folders that must be there.
    """
    if version != __version__:
        return f"runs hrm-text {__version__}, this machine {version}; install the same on all"
    for place in map(Path, places):
        if not place.exists():
            shown = place.parent if place.name.startswith(PROBE) else place
            return f"does not see {shown}; name folders of a file system that all nodes share"
    return None


@contextlib.contextmanager
def _probes(folders: Sequence[Path]) -> Iterator[list[Path]]:
    """A file in each folder, whose name no other machine can know by chance."""
    probes = [folder.resolve() / f"{PROBE}{uuid.uuid4().hex[:8]}.tmp" for folder in folders]
    try:
        for probe in probes:
            probe.touch()
        yield probes
    finally:
        for probe in probes:
            probe.unlink(missing_ok=True)
