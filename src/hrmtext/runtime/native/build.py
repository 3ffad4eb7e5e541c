"""Building C++ kernels for this processor with its own compiler, once a machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from hrmtext.errors import BackendError
from hrmtext.runtime.log import logger

HEADERS = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
NATIVE = {"x86_64": ("-march=native",), "AMD64": ("-march=native",)}
"""How compilers are told to use all instructions of this processor."""
NATIVE_ELSEWHERE = ("-march=native", "-mcpu=native")
"""The same for others, not all of which know the first; x86 takes the second for a mere hint."""
BUILD_SECONDS = 300


def compiler() -> str | None:
    """Path of the C++ compiler that will be used: $CXX, or the first that is found."""
    named = os.environ.get("CXX")
    return next(
        (path for name in (named, *COMPILERS) if name and (path := shutil.which(name))), None
    )


@functools.cache
def load_kernel(source: Path, use: str) -> ctypes.CDLL:
    """A C++ file as a shared library, built where this machine has not built this source yet.

    It is kept in the user's cache folder under a name that holds the source, the compiler and the
    processor's instructions, so that another machine with the same home folder builds its own.

    Args:
        use: what it is for and how one does without, for the messages: `step=cpp` ...

    Raises:
        BackendError: no compiler, or it fails; its message is shown.
    """
    path = compiler()
    if path is None:
        raise BackendError(
            f"{use} needs a C++ compiler (g++ or clang++) and none was found; install one, or "
            "leave the choice to auto"
        )
    folder = _cache_folder()
    file = folder / f"{source.stem}-{_key(source, path)}.so"
    if not file.is_file():
        _build(source, path, file, use)
    kernel = ctypes.CDLL(str(file))
    _share_threads(kernel)
    return kernel


def _share_threads(kernel: ctypes.CDLL) -> None:
    """Let a kernel run on the OpenMP threads that torch uses, where this process has such."""
    process = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    if all(hasattr(process, name) for name in names):
        kernel.hrm_use_pool(
            *(ctypes.cast(getattr(process, name), ctypes.c_void_p) for name in names)
        )
    else:
        logger.debug("CPU kernels start threads of their own: no %s in this process", names[0])


def _build(source: Path, path: str, file: Path, use: str) -> None:
    logger.info("building the CPU kernel of %s with %s (some seconds, once)", use, path)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        built = Path(folder) / file.name
        messages = []
        for native in NATIVE.get(platform.machine(), NATIVE_ELSEWHERE):
            command = [path, *FLAGS, native, f"-I{HEADERS}", str(source), "-o", str(built)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
            )
            if done.returncode == 0:
                built.replace(file)  # whole or not at all, whoever builds at the same time
                return
            messages.append(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    raise BackendError(f"{use}: the compiler failed:\n" + "\n".join(messages))


def _cache_folder() -> Path:
    """A folder that only this user can write; a fresh one for this process where none is had."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hrm-text"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hrm-text-"))


def _key(source: Path, path: str) -> str:
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    files = [source, *sorted(source.parent.glob("*.h")), *sorted(HEADERS.glob("*.h"))]
    texts = (file.read_text() for file in files)
    parts = (*texts, *FLAGS, version.stdout, platform.machine(), _instructions())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()


def _instructions() -> str:
    """What this processor can do, as the system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
