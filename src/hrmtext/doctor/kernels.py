"""Which attention backends run here and compute the right thing, and whether compilation can."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from hrmtext.batch import PackedBatch, RowLayout
from hrmtext.doctor.finding import Finding
from hrmtext.errors import BackendError
from hrmtext.model.attention.api import BACKENDS, make_plan
from hrmtext.runtime.device import pick_training_dtype

HEADS, HEAD_DIM = 2, 64
ROWS = ((5, 3), (1, 9), (40, 25))
"""(prompt, response) lengths of the probe; one row is longer than a tile of any kernel's half."""
UNITS = 8
"""Units in the last place by which a backend may miss fp64; products of rounded inputs add up."""


def check_backends(device: torch.device) -> list[Finding]:
    """Run every backend, forward and backward, against the reference in fp64 on the CPU."""
    dtype = pick_training_dtype("auto", device)
    return [_check(name, device, dtype) for name in BACKENDS]


def _check(name: str, device: torch.device, dtype: torch.dtype) -> Finding:
    what = f"attention {name}"
    try:
        error = probe(name, device, dtype)
    except (BackendError, RuntimeError, NotImplementedError) as problem:
        said = str(problem).strip().splitlines()[0]
        wanted_here = device.type == "cuda" and name == "flash"
        if wanted_here:
            advice = "attention=auto takes sdpa instead, which is slower; see the reason"
            return Finding("kernels", what, "warning", said, advice)
        return Finding("kernels", what, "ok", f"not here: {said}")
    if error > UNITS * torch.finfo(dtype).eps:
        advice = "do not train with it: give attention=sdpa, and report this"
        return Finding("kernels", what, "problem", f"off by {error:.2%}", advice)
    return Finding("kernels", what, "ok", f"right to {error:.0e}, forward and gradient")


def probe(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of output, dq, dk, dv against the reference in fp64.

    Raises:
        BackendError: the backend does not run on this device.
    """
    layout = _layout()
    generator = torch.Generator().manual_seed(0)
    shape = (layout.num_tokens, HEADS, HEAD_DIM)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    right = _run("reference", layout, inputs, torch.device("cpu"), torch.float64)
    found = _run(name, layout, inputs, device, dtype)
    return max(
        float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)
    )


def _run(
    name: str,
    layout: RowLayout,
    inputs: list[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    q, k, v, arriving = (x.to(device, dtype, copy=True) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = make_plan(layout, device=device, dtype=dtype, backend=name, head_dim=HEAD_DIM)
    out = plan.attend(q, k, v, slot=0)
    # Not backward(arriving), which imports sympy for the shape of it.
    (out * arriving).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _layout() -> RowLayout:
    rows = [([1] * prompt, [1] * response) for prompt, response in ROWS]
    return PackedBatch.from_rows(rows).layout


def check_compile(device: torch.device) -> list[Finding]:
    """Whether torch.compile has what it needs: a C++ compiler that works, on a GPU also Triton."""
    compiler = next((name for name in ("g++", "clang++", "cl") if shutil.which(name)), None)
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        advice = "install triton (official CUDA builds of torch bring it), or set compile=false"
        return [Finding("kernels", "compile", "warning", "no triton", advice)]
    if compiler is None:
        advice = "install g++ or clang++ to use compile=true; without it nothing is lost but speed"
        status = "warning" if device.type == "cuda" else "ok"
        return [Finding("kernels", "compile", status, "no C++ compiler", advice)]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <vector>\nint main() { return std::vector<int>(3).size() - 3; }"
        )
        command = [compiler, str(source), "-o", str(source.with_suffix(""))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[0]
        advice = "install the compiler's standard library headers, or set compile=false"
        return [Finding("kernels", "compile", "warning", f"{compiler} fails: {said}", advice)]
    return [Finding("kernels", "compile", "ok", f"{compiler} works")]
