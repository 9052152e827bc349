"""Which room may know which: entry points → learn, data, report → deploy → model → torch."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
FORBIDDEN = {
    "model": {"pytorch_lightning", "hydra", "omegaconf", "wandb", "ffcv", "numba", "torchmetrics", "pandas"}
    | {"repvgg.deploy", "repvgg.data", "repvgg.learn", "repvgg.report"},
    "deploy": {"pytorch_lightning", "hydra", "omegaconf", "wandb", "ffcv", "numba", "pandas"}
    | {"repvgg.data", "repvgg.learn", "repvgg.report"},
    "data": {"pytorch_lightning", "hydra", "omegaconf", "wandb", "repvgg.report", "repvgg.learn"},
    "report": {"pytorch_lightning", "ffcv", "repvgg.data", "repvgg.learn"},
    "learn": {"hydra", "omegaconf", "repvgg.report"},
    "bench": {"pytorch_lightning", "ffcv", "numba", "pandas", "wandb"},
}
for room in set(FORBIDDEN) - {"bench"}:
    FORBIDDEN[room].add("repvgg.bench")


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides its direction"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_know_only_what_they_may(room: str) -> None:
    files = list((SRC / "repvgg" / room).rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            hit = [f for f in FORBIDDEN[room] if name == f or name.startswith(f + ".")]
            assert not hit, f"{file.relative_to(SRC)} imports {name}"


def test_hydra_main_lives_only_in_entry_points() -> None:
    users = [f for f in (SRC / "repvgg").rglob("*.py") if "hydra.main" in f.read_text()]
    assert not users


def test_this_walk_sees_what_it_forbids() -> None:
    assert "pytorch_lightning" in imported(SRC / "repvgg" / "learn" / "module.py")
    assert "repvgg.model" in imported(SRC / "repvgg" / "learn" / "two_forms.py")
