"""What reads prompts and takes steps for a model: asked for by name, or chosen and said why."""

from __future__ import annotations

import torch

from hrmtext.batch import RowLayout
from hrmtext.errors import BackendError
from hrmtext.generate.cpp import CppStep
from hrmtext.generate.cpp.step import packed_bytes, why_not
from hrmtext.generate.step import DecodeStep, StepFunction
from hrmtext.model import HrmLM, KVCache
from hrmtext.runtime.log import logger
from hrmtext.runtime.native import compiler

CPP_BYTES = 256 << 20
"""Packed weights that `auto` allows: beyond, steps are bound by memory, not by overhead."""
PROBE_PROMPTS, PROBE_TOKENS = (3, 1, 2), 2
"""Tokens that each row reads, and those that it then decodes."""
PROBE_UNITS = {torch.float32: 256, torch.bfloat16: 64}
"""Units in the last place of the largest logit that the kernel may be off the eager step."""


class Steps:
    """The decode steps of one model, made when first asked for."""

    def __init__(self, model: HrmLM) -> None:
        self.model = model
        self._made: dict[str, StepFunction] = {}
        self._auto: str | None = None

    def get(self, name: str) -> StepFunction:
        """The step called `name`: auto, eager, compiled or cpp.

        Raises:
            BackendError: cpp was asked for by name and cannot run here; the message says why.
        """
        if name == "auto":
            if self._auto is None:
                self._auto = self._choose()
            name = self._auto
        step = self._made.get(name)
        if isinstance(step, CppStep):
            step.pack()
        elif step is None:
            step = self._made[name] = self._make(name)
        return step

    def _make(self, name: str) -> StepFunction:
        if name == "cpp":
            step = CppStep(self.model)
            _probe(step)
            return step
        return DecodeStep(self.model, compiled=name == "compiled")

    def _choose(self) -> str:
        try:
            reason = self._against_cpp()
            if reason is None:
                self._made["cpp"] = self._make("cpp")
                return "cpp"
            logger.debug("step=auto: eager, as %s", reason)
        except BackendError as error:  # the machine's compiler, or its arithmetic, is unfit
            logger.warning("step=auto takes eager, which is slower: %s", error)
        return "eager"

    def _against_cpp(self) -> str | None:
        if self.model.lm_head.weight.device.type != "cpu":
            return "the model is not on a CPU"
        if compiler() is None:
            return "there is no C++ compiler for the CPU kernel"
        if packed_bytes(self.model) > CPP_BYTES:
            return f"packed weights would take more than {CPP_BYTES >> 20} MiB"
        return why_not(self.model)


@torch.inference_mode()
def _probe(step: CppStep) -> None:
    """Refuse a kernel that does not compute what the module computes on this very machine."""
    model, config = step.model, step.model.config
    lengths = [min(length, config.max_seq_len) for length in PROBE_PROMPTS]
    layout = RowLayout.from_prefixes(lengths, lengths if config.prefix_lm else [0] * len(lengths))
    capacity = min(max(lengths) + PROBE_TOKENS, config.max_seq_len)
    caches = [KVCache(config, len(lengths), capacity, dtype=torch.float32) for _ in range(2)]
    sides = list(zip((step, DecodeStep(model)), caches, strict=True))
    for at in range(1 + capacity - max(lengths)):
        tokens = (torch.arange(len(lengths) if at else sum(lengths)) * 7 + at) % config.vocab_size
        found, expected = (
            (
                side(tokens, cache, None, 0.0)
                if at
                else side.read(tokens, layout, cache, None, 0.0)
            ).float()
            for side, cache in sides
        )
        error = float((found - expected).abs().max())
        unit = torch.finfo(model.lm_head.weight.dtype).eps * float(expected.abs().max())
        allowed = PROBE_UNITS[model.lm_head.weight.dtype] * unit
        if not error <= allowed:
            raise BackendError(
                f"the CPU kernel's logits differ from the module's by {error:.2e}, expected at "
                f"most {allowed:.2e}; use step=eager and report the compiler and processor"
            )
