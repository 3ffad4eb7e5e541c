"""Training checkpoints in the public code's form, written by torch's own checkpoint functions.

Run as a script by the distributed test: rank, world size, rendezvous file, folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

SHAPE = {"n_layers": 4, "hidden_size": 32, "num_heads": 2, "vocab": 384, "inner": 256}
ARCH = {
    "name": "baselines.hrm_nocarry_bp_warmup@HierarchicalReasoningModel",
    "head": "lm_head@LMHead",
    "half_layers": True,
    "n_layers": 4,
    "hidden_size": 32,
    "num_heads": 2,
    "expansion": 4,
    "norm_type": "pre",
    "norm_eps": 1e-6,
    "pos_emb_type": "rope",
    "rope_theta": 10000.0,
    "init_type": "lecun_normal",
    "H_cycles": 2,
    "L_cycles": 3,
    "bp_warmup_ratio": 0.2,
    "bp_max_steps": 5,
}


def linear(rows: int, columns: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.randn(rows, columns, generator=generator) * columns**-0.5
    return layer


class Attention(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.gqkv_proj = linear(128, 32, generator)
        self.o_proj = linear(32, 32, generator)


class Mlp(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.gate_up_proj = linear(512, 32, generator)
        self.down_proj = linear(32, 256, generator)


class Layer(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.attn = Attention(generator)
        self.mlp = Mlp(generator)


class Core(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.layers = nn.ModuleList(Layer(generator) for _ in range(2))


class Level(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.core = Core(generator)


class Recurrence(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.H_level = Level(generator)
        self.L_level = Level(generator)
        start = torch.randn(32, generator=generator).bfloat16()
        self.register_buffer("zL_init", start)


class Embedding(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.randn(384, 32, generator=generator) * 32**-0.5)


class Head(nn.Module):
    """The tree of names that the public code's model has."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.model = Recurrence(generator)
        self.embed_tokens = Embedding(generator)
        self.lm_head = linear(384, 32, generator)


class Averaging(torch.optim.Optimizer):
    """State of the keys that the public optimizer has; a step moves weights and averages."""

    def __init__(self, params, ema: float | None = 0.5):
        defaults = {"lr": torch.tensor(0.0), "betas": (0.9, 0.95), "weight_decay": 0.1, "ema": ema}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
                if ema is not None:
                    state["param_ema"] = param.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                param.add_(param.grad, alpha=-0.1)
                self.state[param]["step"] += 1
                if group["ema"] is not None:
                    self.state[param]["param_ema"].lerp_(param, 1 - group["ema"])


def train_a_little(model: nn.Module, optimizer: Averaging) -> None:
    """Weights and averages differ afterwards."""
    for _ in range(2):
        sum((p.square()).sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()


def write_configs(root: Path, arch: dict | None = None, tokenizer_path: str = "gone") -> None:
    root.mkdir(parents=True, exist_ok=True)
    config = {
        "arch": {**ARCH, **(arch or {})},
        "data": {"path": "data/sampled", "target_only": True},
        "global_batch_size": 196608, "epochs": 4, "lr": 2.2e-4, "lr_min_ratio": 1.0,
        "lr_warmup_steps": 2000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "ema": 0.9999,
        "fwd_bwd_dtype": "bfloat16", "project_name": "x", "run_name": "y", "seed": 0,
    }  # fmt: skip
    metadata = {
        "max_seq_len": 4096,
        "tokenizer_info": {
            "boq": "<|im_start|>", "eoq": "<|im_end|>", "eoa": "<|box_end|>",
            "condition_mapping": {"direct": "<|object_ref_start|>"},
            "tokenizer_path": tokenizer_path,
        },
        "total_length": 12345, "vocab_size": 384,
    }  # fmt: skip
    (root / "all_config.yaml").write_text(yaml.dump(config))
    (root / "train_metadata.yaml").write_text(yaml.dump(metadata))


def write_run(root: Path, *, by_number: bool = False, ema: float | None = 0.5, epoch: int = 1):
    """A one-rank run folder; returns its model and optimizer."""
    write_configs(root)
    model = Head(seed=epoch)
    optimizer = Averaging(model.parameters(), ema=ema)
    train_a_little(model, optimizer)
    state = optimizer.state_dict() if by_number else get_optimizer_state_dict(model, optimizer)
    folder = root / f"fsdp2_epoch_{epoch}"
    dcp.save({"model": model.state_dict(), "optim": state}, checkpoint_id=folder, no_dist=True)
    torch.save(None, root / f"carry_epoch_{epoch}.0.pt")
    return model, optimizer


def save_shards(root: Path) -> None:
    """Shard as the public code does (FSDP2) and save from every rank."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (dist.get_world_size(),))
    model = Head(seed=3)
    for module in model.modules():
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    optimizer = Averaging(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=root / "fsdp2_epoch_2")
    torch.save(None, root / f"carry_epoch_2.{dist.get_rank()}.pt")
    dist.destroy_process_group()
