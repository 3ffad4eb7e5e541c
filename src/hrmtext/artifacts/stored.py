"""A model as it lies on disk: its shape is known and its tensors fit, but none has been read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from hrmtext.artifacts.names import Place, outside_names, place_of, tensor_shapes
from hrmtext.artifacts.safetensors_file import Entry, SafetensorsFile
from hrmtext.config.base import nearest
from hrmtext.config.model import ModelConfig
from hrmtext.errors import CheckpointError
from hrmtext.model import HrmLM, empty_model

# Buffers that some files hold although they follow from the config.
_IGNORED_ENDS = ("rotary_emb.inv_freq", ".cos_cached", ".sin_cached")
_IGNORED_NAMES = ("model.zH_init",)


class TensorStore(Protocol):
    """Named tensors that are read one at a time: `SafetensorsFile`, `DcpFolder`."""

    entries: dict[str, Entry]

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Values of one tensor, in new memory or in `out`."""
        ...


@dataclasses.dataclass
class StoredModel:
    """An opened model, in whatever form; `opening.open_stored` makes one."""

    kind: str
    """`native`, `hf` or `upstream`."""
    folder: Path
    """The folder that holds the weights (a run's newest checkpoint, for instance)."""
    config: ModelConfig
    weights: str
    """`raw`, `ema`, or `only` where the form holds one set."""
    alternatives: tuple[str, ...]
    """All sets of weights that are there."""
    tokenizer_folder: Path | None
    """A folder with tokenizer.json, or None."""
    gradient_routing: list[int] | None
    """`L_bp_cycles`, where the form says it."""
    token_ids: dict[str, int]
    """bos_token_id, eos_token_id and pad_token_id as the model's files state them."""
    parts: dict[str, list[tuple[TensorStore, str]]] = dataclasses.field(repr=False)
    """Our name -> stores and outside names that hold its rows in order."""

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by `HrmLM`'s names, in the order of its state dict."""
        return tensor_shapes(self.config)

    def names(self) -> list[str]:
        """`HrmLM`'s names of all tensors, in the order of its state dict."""
        return list(self.shapes)

    def entry(self, name: str) -> Entry:
        """Dtype and shape of a tensor, without reading it."""
        store, outside = self.parts[name][0]
        return Entry(store.entries[outside].dtype, self.shapes[name])

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the head, which is that of all matrices in any usual file."""
        return self.entry("lm_head.weight").dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(self.entry(name).nbytes for name in self.names())

    def tensor(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read one tensor, in the dtype it is stored in; the parts of a split one are joined.

        Args:
            out: contiguous CPU memory of the right shape and dtype to read into.

        Raises:
            CheckpointError: the file is damaged.
        """
        entry = self.entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype) if out is None else out
        parts = self.parts[name]
        for (store, outside), rows in zip(parts, _chunks(tensor, len(parts)), strict=True):
            store.read(outside, rows)
        return tensor

    def load_model(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> HrmLM:
        """The model in eval mode; memory beyond its weights is one tensor.

        On the CPU a tensor whose file holds it whole and in `dtype` is mapped, not copied: its
        pages are read when first used.

        Args:
            dtype: number format of all weights; None: that of the head.
        """
        dtype = self.dtype if dtype is None else dtype
        model = empty_model(self.config, device="meta", dtype=dtype)
        state = {}
        mapped: dict[int, torch.Tensor] = {}
        for name in self.names():
            parts = self.parts[name]
            store, outside = parts[0]
            tensor = None
            whole = len(parts) == 1 and self.entry(name).dtype == dtype
            if whole and str(device) == "cpu" and isinstance(store, SafetensorsFile):
                if id(store) not in mapped:
                    mapped[id(store)] = store.map()
                tensor = store.view(outside, mapped[id(store)])
            if tensor is None:
                tensor = self.tensor(name).to(device=device, dtype=dtype)
            state[name] = tensor
        model.load_state_dict(state, assign=True)
        return model.eval()


def fit(
    config: ModelConfig, stores: Sequence[TensorStore], forms: Sequence[str], where: str
) -> dict[str, list[tuple[TensorStore, str]]]:
    shapes = tensor_shapes(config)
    problems = []
    found: dict[str, dict[int, tuple[TensorStore, str, Place]]] = {}
    for store, outside in _all_names(stores):
        place = next((p for f in forms if (p := place_of(outside, f)) is not None), None)
        if place is None or place.name not in shapes:
            options = [o for name in shapes for form in forms for o in outside_names(name, form)]
            problems.append(f"unexpected {outside}{nearest(outside, options)}")
            continue
        parts = found.setdefault(place.name, {})
        others = [other for _, _, other in parts.values()]
        if place.index in parts or any(o.num_parts != place.num_parts for o in others):
            problems.append(f"{place.name} is there twice, as {outside} too")
            continue
        parts[place.index] = (store, outside, place)
    ready: dict[str, list[tuple[TensorStore, str]]] = {}
    for name, shape in shapes.items():
        parts = found.get(name)
        if not parts:
            problems.append(f"missing {name}")
            continue
        num_parts = next(iter(parts.values()))[2].num_parts
        if len(parts) < num_parts:
            form = next(f for f in forms if len(outside_names(name, f)) == num_parts)
            wanted = outside_names(name, form)
            lacking = [wanted[i] for i in range(num_parts) if i not in parts]
            problems.append(f"{name} lacks its part {', '.join(lacking)}")
            continue
        ready[name] = [parts[index][:2] for index in range(num_parts)]
        expected = (shape[0] // num_parts, *shape[1:])
        dtypes = {store.entries[outside].dtype for store, outside in ready[name]}
        if len(dtypes) > 1:
            problems.append(f"the parts of {name} have several dtypes: {sorted(map(str, dtypes))}")
        for store, outside in ready[name]:
            got = store.entries[outside]
            if got.shape != expected:
                problems.append(f"{outside} has shape {got.shape}, the config says {expected}")
            if not got.dtype.is_floating_point:
                problems.append(f"{outside} has dtype {got.dtype}, expected a floating one")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{where}: weights do not fit: {'; '.join(problems[:6])}{more}")
    return ready


def _all_names(stores: Iterable[TensorStore]) -> Iterator[tuple[TensorStore, str]]:
    for store in stores:
        for outside in store.entries:
            if outside not in _IGNORED_NAMES and not outside.endswith(_IGNORED_ENDS):
                yield store, outside


def _chunks(tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return (tensor,) if count == 1 else tensor.chunk(count)
