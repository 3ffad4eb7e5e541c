"""Building the kernel for this processor with its own compiler, once a machine."""

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

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native")
"""How compilers are told to use all instructions of this processor; not all know the first."""
BUILD_SECONDS = 300


def compiler() -> str | None:
    """Path of the C++ compiler that will be used: $CXX, or the first that is found."""
    named = os.environ.get("CXX")
    return next(
        (path for name in (named, *COMPILERS) if name and (path := shutil.which(name))), None
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel as a shared library, built where this machine has not built this source yet.

    It is kept in the user's cache folder under a name that holds the source, the compiler and the
    processor's instructions, so that another machine with the same home folder builds its own.

    Raises:
        BackendError: no compiler, or it fails; its message is shown.
    """
    path = compiler()
    if path is None:
        raise BackendError(
            "step=cpp needs a C++ compiler (g++ or clang++) and none was found; install one, or "
            "use step=eager"
        )
    folder = _cache_folder()
    file = folder / f"decode-{_key(path)}.so"
    if not file.is_file():
        _build(path, file)
    loaded = ctypes.CDLL(str(file))
    for name in ("hrm_lanes", "hrm_has_bf16", "hrm_workspace"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.hrm_step.restype = None
    return loaded


def _build(path: str, file: Path) -> None:
    logger.info("building the CPU decode kernel with %s (some seconds, once)", path)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        built = Path(folder) / file.name
        messages = []
        for native in NATIVE:
            command = [path, *FLAGS, native, str(SOURCE), "-o", str(built)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
            )
            if done.returncode == 0:
                built.replace(file)  # whole or not at all, whoever builds at the same time
                return
            messages.append(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    raise BackendError("step=cpp: the compiler failed:\n" + "\n".join(messages))


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


def _key(path: str) -> str:
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    parts = (SOURCE.read_text(), *FLAGS, version.stdout, platform.machine(), _instructions())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()


def _instructions() -> str:
    """What this processor can do, as the system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
