"""The house has layers: a layer imports only from layers above it, and nothing runs at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "hrmtext"
LAYER = {
    "errors": 0, "config": 0,
    "runtime": 1, "batch": 1,
    "model": 2, "data": 2, "artifacts": 2,
    "train": 3, "generate": 3, "convert": 3,
    "evaluate": 4, "api": 4, "hf": 4, "ablate": 4, "doctor": 4,
    "cli": 5, "__init__": 5,
}  # fmt: skip
SIBLINGS = {
    ("config", "errors"), ("artifacts", "model"), ("convert", "generate"),
    ("ablate", "evaluate"),
}  # fmt: skip
"""Imports inside one layer that docs/architecture.md names."""
TORCH_FREE = ("errors", "config", "cli.main")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """First-level parts of hrmtext that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "hrmtext":
                names = [f"hrmtext.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("hrmtext.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_layer_imports_only_from_layers_above_it(path):
    part = part_of(path)
    assert part in LAYER, f"{part} has no layer: give it one here and in docs/architecture.md"
    for other in imported_parts(path) - {part}:
        allowed = LAYER[other] < LAYER[part] or (part, other) in SIBLINGS
        assert allowed, f"{path.relative_to(PACKAGE)} imports hrmtext.{other}"


def test_allowed_sibling_imports_are_used():
    used = {(part_of(path), other) for path in modules() for other in imported_parts(path)}
    assert used >= SIBLINGS, f"no longer needed: {SIBLINGS - used}"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_errors_config_and_the_command_line_start_without_torch(name):
    code = (
        f"import sys, hrmtext.{name}\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, f"imported: {result.stderr}"


COMPILES_NOTHING = """
import sys, torch, hrmtext.api, hrmtext.evaluate, hrmtext.train
from hrmtext.batch import PackedBatch
from hrmtext.config.model import preset
from hrmtext.model import build_model, make_plan
from hrmtext.train.optim import AdamAtan2

model = build_model(preset("test"), seed=0)
optimizer = AdamAtan2(model.parameters(), lr=1e-3)
batch = PackedBatch.from_rows([([5, 6], [7])])
out = model(batch.tokens, batch.positions, make_plan(batch.layout))
out.logits.sum().backward()
optimizer.step()
heavy = {"torch._dynamo", "sympy", "transformers", "pandas", "pyarrow", "tensorboard"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""


def test_a_training_step_that_compiles_nothing_imports_no_compiler():
    """torch._dynamo and what it imports take two seconds of every command."""
    code = [sys.executable, "-c", COMPILES_NOTHING]
    result = subprocess.run(code, capture_output=True, text=True)
    assert result.returncode == 0, f"imported: {result.stderr}"


def test_files_stay_small():
    long = {p.name: n for p in modules() if (n := len(p.read_text().splitlines())) > 420}
    assert not long, f"over 420 lines, split by noun: {long}"
