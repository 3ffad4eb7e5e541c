"""How long do head and loss take, forward and gradient, by kernel?

python benchmarks/loss.py [--tokens 512] [--hidden 1024] [--vocab 65536] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from common import interleave, matmul_flops, summary, write_result
from torch.nn.functional import cross_entropy as dense_cross_entropy

from hrmtext.runtime.device import DTYPES, pick_device, pick_training_dtype
from hrmtext.train.loss import LossKernel, cross_entropy

KERNELS: tuple[LossKernel, ...] = ("chunked", "compiled", "linear")


def main() -> None:
    """Measure and write results/loss-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="supervised tokens")
    parser.add_argument("--hidden", type=int, default=1_024)
    parser.add_argument("--vocab", type=int, default=65_536)
    parser.add_argument("--chunk-bytes", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    given = None if arguments.dtype == "auto" else DTYPES[arguments.dtype]
    dtype = given or pick_training_dtype(None, device)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.tokens, arguments.hidden)
    hidden = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(arguments.vocab, arguments.hidden, generator=generator)
    weight = (weight * arguments.hidden**-0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(arguments.vocab, shape[:1], generator=generator).to(device)

    def side(total: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            total().backward()

        return run

    sides = {
        kernel: side(
            lambda kernel=kernel: (
                cross_entropy(
                    hidden, weight, labels, chunk_bytes=arguments.chunk_bytes, kernel=kernel
                ).total
            )
        )
        for kernel in KERNELS
    }
    sides["whole logits"] = side(
        lambda: dense_cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    )
    seconds = interleave(sides, rounds=arguments.rounds, device=device, warmup=2)
    floor = 6 * arguments.tokens * arguments.hidden * arguments.vocab / matmul_flops(device, dtype)
    write_result(
        "loss",
        device,
        {
            "supervised_tokens": arguments.tokens,
            "hidden_size": arguments.hidden,
            "vocab_size": arguments.vocab,
            "number_format": str(dtype).removeprefix("torch."),
            "chunk_bytes": arguments.chunk_bytes,
            "milliseconds": {
                name: summary([1e3 * value for value in values]) for name, values in seconds.items()
            },
            "share_of_the_matmul_rate": {
                name: round(floor / statistics.median(values), 2)
                for name, values in seconds.items()
            },
        },
    )


if __name__ == "__main__":
    main()
