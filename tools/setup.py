"""Create .venv with everything that hrm-text needs. Quick when repeated, then without network.

Standard library only. On a machine without an NVIDIA GPU it takes the torch release that
constraints-cpu.txt pins; TORCH_INDEX_URL may name the package index of PyTorch's CPU builds, as
PyTorch's install page gives it. With a GPU it takes the ordinary build.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "setup-stamp"
CONSTRAINTS = ROOT / "constraints-cpu.txt"
EXTRAS = "dev"


def main() -> int:
    """Set up where needed; 0 on success."""
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"hrm-text needs Python 3.11 or newer, but {sys.executable} is {found}.\n"
            "Name another one: make setup PYTHON=python3.12",
            file=sys.stderr,
        )
        return 1
    has_gpu = nvidia_gpu()
    wanted = stamp(has_gpu)
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return 0
    start = time.monotonic()
    build = "the ordinary torch (an NVIDIA GPU was found)" if has_gpu else "torch for the CPU"
    print(f"setup: installing into .venv with {build}; this takes a minute or two ...", flush=True)
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not has_gpu:
        index = os.environ.get("TORCH_INDEX_URL")
        from_index = ["--index-url", index] if index else []
        run([*pip, "-c", str(CONSTRAINTS), *from_index, "torch"])
        pip += ["-c", str(CONSTRAINTS)]
    run([*pip, "-e", f"{ROOT}[{EXTRAS}]"])
    if not has_gpu and cuda_build(python):
        print(
            "setup: note: this is a CUDA build of torch on a machine without a GPU. It works; for "
            "the smaller CPU build remove .venv and set TORCH_INDEX_URL as PyTorch's install page "
            "says."
        )
    STAMP.write_text(wanted)
    print(f"setup: done in {time.monotonic() - start:.0f} s", flush=True)
    return 0


def nvidia_gpu() -> bool:
    """Whether the driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def cuda_build(python: Path) -> bool:
    """Whether the installed torch is a CUDA build."""
    code = "import torch; print(torch.version.cuda is not None)"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip() == "True"


def stamp(has_gpu: bool) -> str:
    """What the installation depends on."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints-cpu.txt"):
        digest.update((ROOT / name).read_bytes())
    return f"{digest.hexdigest()} {sys.version} gpu={has_gpu} extras={EXTRAS} root={ROOT}\n"


def run(command: list[str]) -> None:
    """Run an installer; its own message is the error."""
    done = subprocess.run(command, check=False)
    if done.returncode:
        print(
            "setup: the installation failed; the lines above say why. Nothing else was changed: "
            "fix the cause (often the network) and run the same command again",
            file=sys.stderr,
        )
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    raise SystemExit(main())
