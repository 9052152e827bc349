"""What README and CONTRIBUTING show, done."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from repvgg.cli import ROOT
from repvgg.model import Affine, Block, Branch, ConvShape, equivalence, identity_map, to_deploy
from support.networks import randomize


def fenced(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


@pytest.mark.parametrize("shape", [ConvShape(8, 8), ConvShape(4, 8, stride=2)])
def test_the_readmes_block_design_converts(shape: ConvShape) -> None:
    (text,) = fenced("README.md", "yaml")
    assert "# @package block" in text
    config = yaml.safe_load(text)
    block = randomize(Block(shape, instantiate(config["branches"]), norm=config["norm"]).double())
    assert len(block.branches) == (3 if shape.keeps_shape else 2)
    assert equivalence(block, to_deploy(block), torch.randn(2, shape.in_channels, 6, 6)).rel_l2 < 1e-10


def test_the_contributing_branch_converts() -> None:
    (text,) = fenced("CONTRIBUTING.md", "python")
    names = {"Branch": Branch, "ConvShape": ConvShape, "Affine": Affine, "identity_map": identity_map}
    scope = {**names, "torch": torch, "nn": nn, "Tensor": Tensor, "__name__": "example"}
    exec(compile("from __future__ import annotations\n" + textwrap.dedent(text), "CONTRIBUTING.md", "exec"), scope)
    block = Block(ConvShape(4, 4), [scope["Scaled"].where_it_fits]).double()
    with torch.no_grad():
        block.branches[0].factor.copy_(torch.tensor([0.5, -1, 2, 3]))
    assert equivalence(block, to_deploy(block), torch.randn(2, 4, 5, 5)).rel_l2 < 1e-10


def test_every_file_and_option_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert (ROOT / path).exists(), path
    for group in ("model", "ablation", "data", "recipe", "trainer", "logger"):
        (row,) = re.findall(rf"^\| `{group}` \|(.*)\|$", text, re.MULTILINE)
        there = {file.stem.removeprefix("repvgg_") for file in (ROOT / "conf" / group).glob("*.yaml")}
        assert there == set(re.sub(r"\(.*?\)|`|,|repvgg_", " ", row).split()), group


def test_the_repository_speaks_of_itself_alone() -> None:
    """No path of a machine in a file that is tracked."""
    tracked = [f for pattern in ("*.md", "conf/**/*", "src/**/*", "experiments/**/*") for f in ROOT.glob(pattern)]
    for file in tracked:
        if file.suffix in {".md", ".yaml", ".py", ".json", ".csv"}:
            assert not re.search(r"/(home|root|work)/", Path(file).read_text()), file
