"""Kernels for variable-length attention, which one can run here, and a proof that it is right.

Letters: Q packed queries, J packed keys, G segments, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch

from hrmtext.errors import BackendError

HALF = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256
PROBE_UNITS = 4
"""Units in the last place of the number format by which a kernel may miss fp32 in the probe."""
PROBE_SEGMENTS = ((3, 3), (1, 5), (4, 9), (130, 300))
"""(queries, keys) of the probe's segments; the last is longer than any kernel's tile."""


class VarlenKernel(Protocol):
    """Attention of packed query segments over packed key segments."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
    ) -> torch.Tensor:
        """(Q, N, K) queries, (J, N, K) keys and values -> (Q, N, K), differentiable.

        Args:
            cu_q, cu_k: (G+1) int32 on the device, where each segment starts; the last is Q or J.
            max_q, max_k: most queries and keys of a segment.
            causal: the last query of a segment sees all its keys, the one before all but the last
                (bottom-right alignment); False: all queries see all keys.
        """
        ...


def torch_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
) -> torch.Tensor:
    """FlashAttention as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=q.shape[-1] ** -0.5, window_size=window
    )
    assert isinstance(out, torch.Tensor), "no auxiliary output was asked for"
    return out


def flash_attn_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
) -> torch.Tensor:
    """The package flash-attn, 2.1 or later (before, causal meant top-left alignment)."""
    return _flash_attn_function()(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_q,
        max_k,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def reference_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
) -> torch.Tensor:
    """One segment after the other in plain torch, in fp32 or better; the oracle of the kernels."""
    del max_q, max_k
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        scores = torch.einsum("ink,jnk->nij", q[q0:q1].to(wide), k[k0:k1].to(wide))
        scores = scores * q.shape[-1] ** -0.5  # (N, queries, keys)
        if causal:
            last_seen = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=q.device)
            hidden = torch.arange(k1 - k0, device=q.device) > last_seen[:, None]
            scores = scores.masked_fill(hidden, float("-inf"))
        parts.append(torch.einsum("nij,jnk->ink", scores.softmax(-1), v[k0:k1].to(wide)))
    return torch.cat(parts).to(q.dtype)


KERNELS: dict[str, VarlenKernel] = {
    "torch": torch_kernel,
    "flash_attn": flash_attn_kernel,
    "reference": reference_kernel,
}
FAST_KERNELS = ("torch", "flash_attn")
"""In the order in which they are tried."""


def find_kernel(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str:
    """Name of the first fast kernel that runs and computes the right thing.

    Args:
        head_dim: K; None: not known yet, 64 is tried.

    Raises:
        BackendError: none does; the message says why, kernel by kernel.
    """
    reasons = []
    for name in FAST_KERNELS:
        reason = kernel_problem(name, device, dtype, head_dim)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendError(
        f"no FlashAttention kernel can run ({'; '.join(reasons)}). Use the backend 'sdpa', which "
        "runs everywhere"
    )


def kernel_problem(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """Why kernel `name` cannot be used on `device` with `dtype`; None: it can."""
    if name == "reference":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on the {device.type.upper()}"
    if dtype not in HALF:
        return f"it takes bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    if reason := width_problem(head_dim or 64):
        return reason
    return _probe(name, device, dtype, head_dim or 64)


def width_problem(head_dim: int) -> str | None:
    """Why FlashAttention cannot take heads of this width; None: it can."""
    if head_dim % 8 or head_dim > WIDEST_HEAD:
        return f"it takes head widths that are multiples of 8 up to {WIDEST_HEAD}, not {head_dim}"
    return None


@cache
def _probe(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run the kernel once, forward and backward, on segments of every kind."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return probe(KERNELS[name], device, dtype, head_dim)
    except ImportError as error:
        return f"not installed ({error})"
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        return f"it failed a small test ({said})"


def probe(
    kernel: VarlenKernel, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """How `kernel` differs from the reference on a small input, forward and gradient; None: not."""
    counts = torch.tensor(PROBE_SEGMENTS)
    cu_q, cu_k = (torch.nn.functional.pad(c.cumsum(0), (1, 0)).int() for c in counts.unbind(1))
    (num_queries, num_keys), (max_q, max_k) = counts.sum(0).tolist(), counts.amax(0).tolist()
    generator = torch.Generator().manual_seed(0)
    q, k, v, arriving = (
        torch.randn(n, 2, head_dim, generator=generator).to(dtype)
        for n in (num_queries, num_keys, num_keys, num_queries)
    )
    for causal in (False, True):
        results = []
        for run, place, number_format in (
            (reference_kernel, torch.device("cpu"), torch.float32),
            (kernel, device, dtype),
        ):
            leaves = [x.to(place, number_format, copy=True).requires_grad_() for x in (q, k, v)]
            starts_q, starts_k = cu_q.to(place), cu_k.to(place)
            out = run(leaves[0], leaves[1], leaves[2], starts_q, starts_k, max_q, max_k, causal)
            out.backward(arriving.to(place, number_format))
            tensors = [out.detach(), *(x.grad for x in leaves if x.grad is not None)]
            results.append([x.float().cpu() for x in tensors])
        for what, expected, found in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            error = float((found - expected).norm() / expected.norm())
            if not error <= PROBE_UNITS * torch.finfo(dtype).eps:
                return f"its {what} is off by {error:.0%} (causal={causal})"
    return None


@cache
def _flash_attn_function() -> Callable[..., Any]:
    try:
        import flash_attn  # pyrefly: ignore
        from flash_attn import flash_attn_varlen_func  # pyrefly: ignore
    except ImportError as error:
        raise ImportError("pip install flash-attn") from error
    version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
    if version < (2, 1):
        raise ImportError(f"flash-attn {flash_attn.__version__} is too old, 2.1 is the first")
    return flash_attn_varlen_func
