"""Checkpoint folders of the public training code: all_config.yaml, train_metadata.yaml, weights.

The weights are a torch.distributed.checkpoint folder an epoch, `fsdp2_epoch_N`, of
{"model": ..., "optim": ...}; the averaged weights are `param_ema` in the optimizer's state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrmtext.artifacts.hf_folder import default_routing
from hrmtext.artifacts.names import outside_names, tensor_names
from hrmtext.config.base import build, read_yaml
from hrmtext.config.model import ModelConfig, round_up
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.model.depth import Depth

CONFIG_FILE = "all_config.yaml"
METADATA_FILE = "train_metadata.yaml"
ARCH_NAME = "baselines.hrm_nocarry_bp_warmup@HierarchicalReasoningModel"
HEAD_NAME = "lm_head@LMHead"
EMA = "param_ema"
DEFAULT_BP_STEPS = 5
_EPOCH = re.compile(r"fsdp2_epoch_(\d+)")


def is_upstream_folder(path: Path) -> bool:
    """Whether `path` is a checkpoint folder of the public code, or one of its epochs."""
    return (upstream_root(path) / CONFIG_FILE).is_file()


def upstream_root(path: Path) -> Path:
    """The folder with all_config.yaml, where `path` may name an epoch inside it."""
    return path.parent if _EPOCH.fullmatch(path.name) else path


def epoch_folder(path: Path) -> Path:
    """The epoch that `path` names, else the newest one.

    Raises:
        CheckpointError: there is none.
    """
    if _EPOCH.fullmatch(path.name):
        return path
    found = {int(m[1]): p for p in path.iterdir() if p.is_dir() and (m := _EPOCH.fullmatch(p.name))}
    if not found:
        raise CheckpointError(
            f"{path} has {CONFIG_FILE} but no weights: expected folders fsdp2_epoch_1, ..."
        )
    return found[max(found)]


def read_upstream_values(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """all_config.yaml and train_metadata.yaml; CheckpointError where one is missing or damaged."""
    try:
        return read_yaml(root / CONFIG_FILE), read_yaml(root / METADATA_FILE)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def from_upstream(
    values: Mapping[str, Any], metadata: Mapping[str, Any], where: str
) -> ModelConfig:
    """The ModelConfig of the two files.

    Raises:
        CheckpointError: a baseline of another architecture, or a feature that HRM-Text as built
            here has not (PostNorm, no rotary embedding, an H stack of another shape).
    """
    arch = values.get("arch")
    if not isinstance(arch, Mapping):
        raise CheckpointError(f"{where}: expected a section `arch`, got {arch!r}")
    name = str(arch.get("name", ""))
    if "H_cycles" not in arch or "hrm" not in name.lower().split("@")[0]:
        raise CheckpointError(
            f"{where}: arch.name is {name!r}; only the HRM ({ARCH_NAME}) can be read, "
            "not the baselines"
        )
    only = {"norm_type": "pre", "pos_emb_type": "rope", "H_override": {}}
    for key, wanted in only.items():
        if arch.get(key) and arch[key] != wanted:
            raise CheckpointError(
                f"{where}: arch.{key} is {arch[key]!r}, only {wanted!r} is supported"
            )
    try:
        layers = int(arch["n_layers"])
        if arch.get("half_layers", False):
            if layers % 2:
                raise CheckpointError(f"{where}: arch.n_layers is {layers}, which has no half")
            layers //= 2
        fields = {
            "vocab_size": metadata["vocab_size"],
            "hidden_size": arch["hidden_size"],
            "num_layers_per_stack": layers,
            "num_heads": arch["num_heads"],
            "head_dim": arch["hidden_size"] // arch["num_heads"],
            "expansion": float(arch["expansion"]),
            "H_cycles": arch["H_cycles"],
            "L_cycles": arch["L_cycles"],
            "max_seq_len": metadata["max_seq_len"],
            "rope_theta": float(arch.get("rope_theta") or 10_000.0),
            "rms_norm_eps": float(arch.get("norm_eps", 1e-6)),
            "embedding_scale": _embedding_scale(arch),
            "prefix_lm": arch.get("attn_type", "prefixlm") == "prefixlm",
        }
        return build(ModelConfig, fields, where=where).canonical()
    except KeyError as error:
        raise CheckpointError(f"{where} lacks the key {error}") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def upstream_routing(arch: Mapping[str, Any], config: ModelConfig) -> list[int] | None:
    """`L_bp_cycles` that say what `bp_max_steps` says; None where that is not set."""
    steps = arch.get("bp_max_steps")
    if steps is None:
        return None
    depth = Depth.from_bp_steps(config, min(int(steps), config.num_stack_calls))
    calls = config.L_cycles + 1
    flags = depth.carries_gradient
    return [sum(flags[h * calls : h * calls + config.L_cycles]) for h in range(config.H_cycles)]


def to_upstream(
    config: ModelConfig, bp_steps: int, tokenizer_info: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of all_config.yaml and train_metadata.yaml.

    Data and hyperparameters are those of the published recipe; the weights do not depend on them.

    Raises:
        ConfigError: a shape that the public code cannot express.
    """
    config.require_hrm("a checkpoint of the public code, as written here,")
    if config.num_heads * config.head_dim != config.hidden_size:
        raise ConfigError(
            f"the public code takes head_dim = hidden_size / num_heads = "
            f"{config.hidden_size / config.num_heads:g}, this model has {config.head_dim}"
        )
    arch = {
        "name": ARCH_NAME,
        "head": HEAD_NAME,
        "n_layers": 2 * config.num_layers_per_stack,
        "half_layers": True,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "expansion": _expansion(config),
        "attn_type": "prefixlm" if config.prefix_lm else "causal",
        "norm_type": "pre",
        "norm_eps": config.rms_norm_eps,
        "pos_emb_type": "rope",
        "rope_theta": config.rope_theta,
        "init_type": "lecun_normal",
        "H_cycles": config.H_cycles,
        "L_cycles": config.L_cycles,
        "bp_warmup_ratio": 0.2,
        "bp_min_steps": 2,
        "bp_max_steps": bp_steps,
    }
    if config.canonical().embedding_scale is not None:
        arch |= {"init_type": "fixed_normal", "init_std": 1.0 / config.scale}
    values = {
        "arch": arch,
        "data": {"path": "data", "target_only": True},
        "global_batch_size": 196_608,
        "epochs": 1,
        "lr": 2.2e-4,
        "lr_min_ratio": 1.0,
        "lr_warmup_steps": 2_000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "ema": 0.9999,
        "fwd_bwd_dtype": "bfloat16",
    }
    metadata = {
        "tokenizer_info": dict(tokenizer_info),
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_seq_len,
        "total_length": 0,
    }
    return values, metadata


def bp_steps_of(config: ModelConfig, L_bp_cycles: list[int] | None) -> tuple[int, bool]:
    """`bp_max_steps` for a gradient routing, and whether it says just the same.

    Where nothing or transformers' default was stated, it is the public code's default.
    """
    default = min(DEFAULT_BP_STEPS, config.num_stack_calls)
    if L_bp_cycles is None or L_bp_cycles == default_routing(config):
        return default, True
    padded = [1] * (config.H_cycles - len(L_bp_cycles)) + list(L_bp_cycles)
    steps = config.H_cycles + sum(padded)
    if upstream_routing({"bp_max_steps": steps}, config) == padded:
        return steps, True
    return default, False


def parameter_order(config: ModelConfig) -> list[str]:
    """Upstream names of the trained tensors in the order of the public model's parameters().

    An optimizer state that is keyed by number counts them so; z_L_init is a buffer, not counted.
    """
    ours = [n for n in tensor_names(config) if n != "model.z_L_init"]
    inner = [n for n in ours if "_module." in n]
    ends = ["model.embed_tokens.weight", "lm_head.weight"]
    return [outside_names(name, "upstream")[0] for name in (*inner, *ends)]


def _embedding_scale(arch: Mapping[str, Any]) -> float | None:
    """1 / initial std of the embedding; None where that is sqrt(hidden_size)."""
    kind, std = arch.get("init_type", "lecun_normal"), arch.get("init_std")
    if kind == "lecun_normal" or (kind == "megatron" and std is None):
        return None
    if kind not in ("fixed_normal", "megatron"):
        raise ValueError(
            f"arch.init_type is {kind!r}, expected lecun_normal, fixed_normal, megatron"
        )
    return 1.0 / (0.02 if std is None else float(std))


def _expansion(config: ModelConfig) -> float:
    """An expansion from which the public code computes this model's SwiGLU width."""
    for expansion in (config.expansion, config.mlp_size * 3 / (2 * config.hidden_size)):
        if round_up(round(expansion * config.hidden_size * 2 / 3), 256) == config.mlp_size:
            return float(expansion)
    raise ConfigError(
        f"the public code computes the SwiGLU width as a multiple of 256, this model's is "
        f"{config.mlp_size}"
    )


def averaged_names(
    entries: Mapping[str, Any], config: ModelConfig, quantity: str = EMA
) -> dict[str, str]:
    """Upstream name -> name of its average in a checkpoint's entries; empty where it has none.

    `quantity` may be another part of the optimizer's state instead: exp_avg, exp_avg_sq, step.

    Optimizer states are saved keyed by name (get_optimizer_state_dict, which the public code
    calls) or by number (optimizer.state_dict()); both are read.
    """
    found = {}
    for number, name in enumerate(parameter_order(config)):
        for key in (name, str(number)):
            full = f"optim.state.{key}.{quantity}"
            if full in entries:
                found[name] = full
                break
    return found


def weight_names(
    entries: Mapping[str, Any], averages: Mapping[str, str], which: str
) -> dict[str, str]:
    """Upstream names of the chosen weights -> names in the checkpoint.

    z_L_init is a buffer: it has no average and is taken as it is.
    """
    prefix = "model."
    # torch.compile puts its own name into those of a wrapped module.
    names = {n.removeprefix(prefix).replace("_orig_mod.", ""): n
             for n in entries if n.startswith(prefix)}  # fmt: skip
    return {**names, **averages} if which == "ema" else names
