"""What do loading and converting an XL-size checkpoint cost in time and memory?

Makes a random bf16 checkpoint of the XL shape in the released (fused) layout, by streaming. Then,
each in a process of its own: the safetensors library's load of the file, mapped and read, and
`hrmtext.load`, each until every byte was used; and the conversions into every form, gate included.

Memory is the peak resident set of the process as the kernel counts it (ru_maxrss): pages of mapped
files that were touched are in it, although the kernel could drop them at any time.

    python benchmarks/convert.py [--folder DIR] [--rounds 5] [--preset XL] [--skip-conversions]
    python benchmarks/convert.py --make DIR          only make the checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import write_result

from hrmtext.artifacts.hf_folder import CONFIG_FILE, WEIGHTS_FILE, to_hf_config
from hrmtext.artifacts.names import tensor_shapes
from hrmtext.artifacts.safetensors_file import Entry, write_safetensors
from hrmtext.config.model import ModelConfig, preset
from hrmtext.data.tokenizer import PromptTokenizer, export_tokenizer, train_tokenizer
from hrmtext.runtime.io import write_json
from hrmtext.runtime.rng import torch_generator

TARGETS = ("hf", "hf-split", "native", "upstream")

# Each measured process prints one JSON line. `use` makes sure that every byte was really read.
PRELUDE = """
import json, resource, sys, time
import torch
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def use(tensors):
    for tensor in tensors:
        tensor.view(-1).view(torch.int64).sum()
path = sys.argv[1]
"""
PLAIN = """
from safetensors.torch import load_file
before = peak()
start = time.perf_counter()
tensors = load_file(path + "/model.safetensors"BACKEND)
opened = time.perf_counter()
use(tensors.values())
"""
OURS = """
import hrmtext, hrmtext.api
before = peak()
start = time.perf_counter()
model = hrmtext.load(path, device="cpu", dtype="bf16")
opened = time.perf_counter()
use(model.model.state_dict().values())
"""
SIDES = {
    "safetensors mapped": PLAIN.replace("BACKEND", ""),
    "safetensors read": PLAIN.replace("BACKEND", ', backend="pread"'),
    "hrmtext.load": OURS,
}
REPORT = """
end = time.perf_counter()
print(json.dumps({"open_s": opened - start, "total_s": end - start, "peak_bytes": peak(),
                  "imports_bytes": before}))
"""


def make_checkpoint(folder: Path, config: ModelConfig, seed: int = 0) -> Path:
    """A random bf16 checkpoint in the released layout, with a small tokenizer of the right kind."""
    folder.mkdir(parents=True)
    shapes = tensor_shapes(config)
    entries = {name: Entry(torch.bfloat16, shape) for name, shape in shapes.items()}

    def draw(name: str) -> torch.Tensor:
        generator = torch_generator(seed, "benchmark", name)
        values = torch.empty(shapes[name], dtype=torch.bfloat16)
        # Plain normals with the std of the initial weights; row blocks keep the memory small.
        std = 1.0 if values.dim() == 1 else shapes[name][-1] ** -0.5
        for rows in values.split(4_096):
            rows.copy_(torch.randn(rows.shape, generator=generator) * std)
        return values

    write_safetensors(folder / WEIGHTS_FILE, entries, draw, metadata={"format": "pt"})
    texts = [
        f"What is {n} + {n * 7}? Sort the words and count {n % 13} letters" for n in range(500)
    ]
    tokenizer = PromptTokenizer(train_tokenizer(texts, 300))
    ids = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
    write_json(folder / CONFIG_FILE, to_hf_config(config, dtype="bfloat16") | ids)
    export_tokenizer(tokenizer, folder, config.max_seq_len)
    return folder


def measure(code: str, folder: Path) -> dict[str, float]:
    """Run a measured snippet in a process of its own."""
    command = [sys.executable, "-c", PRELUDE + code + REPORT, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget a file's pages, so that the next reader waits for the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loading(folder: Path, rounds: int, *, cold: bool) -> dict[str, object]:
    """Our load against the library's two ways to read, in turn; every byte used; medians."""
    file = folder / WEIGHTS_FILE
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    measure(OURS, folder)  # Python's own files are in the page cache from here on
    for _ in range(rounds):
        for side, code in SIDES.items():
            if cold:
                drop_from_cache(file)
            found[side].append(measure(code, folder))
    size = file.stat().st_size
    medians = {
        side: {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
        for side, runs in found.items()
    }
    ours = found["hrmtext.load"]
    ratios = {
        f"time over {side}": round(
            statistics.median(
                a["total_s"] / b["total_s"] for a, b in zip(ours, found[side], strict=True)
            ),
            3,
        )
        for side in SIDES
        if side != "hrmtext.load"
    }
    peak = max(run["peak_bytes"] for run in ours)
    return {
        "file_bytes": size,
        "rounds": rounds,
        **medians,
        **ratios,
        "peak_over_file": round(peak / size, 3),
        "peak_without_imports_over_file": round(
            max(run["peak_bytes"] - run["imports_bytes"] for run in ours) / size, 3
        ),
    }


def conversion(source: Path, target: str, out: Path, extra: list[str]) -> dict[str, object]:
    """One `hrm-text convert` with its gate, in a process of its own."""
    code = (
        "import json, resource, sys, time\n"
        "from hrmtext.cli.main import main\n"
        "start = time.perf_counter()\n"
        "status = main(sys.argv[1:])\n"
        "seconds = time.perf_counter() - start\n"
        "peaks = [resource.getrusage(w).ru_maxrss * 1024 for w in "
        "(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "print('MEASURED', json.dumps({'seconds': round(seconds, 1), 'peak_bytes': sum(peaks)}))\n"
        "sys.exit(status)"
    )
    arguments = ["convert", str(source), str(out), "--to", target, "--json", *extra]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"conversion to {target} failed:\n{result.stdout}\n{result.stderr}")
    *report, measured = result.stdout.strip().splitlines()
    values = json.loads("\n".join(report))
    return {**json.loads(measured.removeprefix("MEASURED ")), "comparison": values["comparison"]}


def main() -> None:
    """Parse, make, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="checkpoint to use; made there if absent")
    parser.add_argument("--make", type=Path, help="only make a checkpoint there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="XL")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--skip-conversions", action="store_true")
    arguments = parser.parse_args()
    config = preset(arguments.preset)
    if arguments.make is not None:
        print(f"made {make_checkpoint(arguments.make, config)}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "checkpoint"
        if not folder.exists():
            make_checkpoint(folder, config)
        values: dict[str, object] = {
            "preset": arguments.preset,
            "memory": "ru_maxrss; touched pages of mapped files are counted",
            "loading, file in the page cache": loading(folder, arguments.rounds, cold=False),
            "loading, file on disk": loading(folder, arguments.rounds, cold=True),
        }
        if not arguments.skip_conversions:
            values["conversions"] = convert_all(folder, Path(scratch), arguments.targets)
    write_result("convert", torch.device("cpu"), values)


def convert_all(folder: Path, scratch: Path, targets: list[str]) -> dict[str, object]:
    """Every target from the fused folder, and the way back from those that hold other names."""
    found: dict[str, object] = {}
    for target in targets:
        out = scratch / target
        found[f"hf -> {target}"] = conversion(folder, target, out, [])
        if target in ("hf-split", "upstream"):
            back = scratch / "back"
            found[f"{target} -> native"] = conversion(out, "native", back, [])
            shutil.rmtree(back)
        shutil.rmtree(out)
    return found


if __name__ == "__main__":
    main()
