"""What conversion leaves alone, what it goes through, and what it refuses."""

import copy
import os
import random
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repvgg.model import (
    Block,
    Branch,
    ConvShape,
    FusedBlock,
    Identity,
    RepVGG,
    equivalence,
    memory_format_of,
    to_deploy,
)
from support.networks import ABLATIONS, ID, K1, K3, randomize, tiny


def snapshot(model: nn.Module) -> dict:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "identities": {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "rng": (torch.get_rng_state(), random.getstate()),
    }


@pytest.mark.parametrize("train", [True, False])
def test_the_source_is_untouched(train: bool) -> None:
    model = randomize(tiny()).train(train)
    model.stages[0][0].eval()  # a mixed mode must survive too
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    model.head.weight.requires_grad_(False)
    before = snapshot(model)
    deployed = to_deploy(model)
    after = snapshot(model)
    assert all(torch.equal(before["state"][k], v) for k, v in after["state"].items())
    assert before["grads"].keys() == after["grads"].keys()
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in
               zip(before["grads"].values(), after["grads"].values(), strict=True))  # fmt: skip
    for key in ("requires_grad", "modes", "identities"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert before["rng"][1] == after["rng"][1]
    # and nothing is shared: training on does not move the deployed network
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not own & {t.data_ptr() for t in [*deployed.parameters(), *deployed.buffers()]}
    assert not any(m.training for m in deployed.modules())
    assert not any(isinstance(m, Block | nn.BatchNorm2d) for m in deployed.modules())


class Segmenter(nn.Module):
    """A bigger model that contains RepVGG as its backbone, and one block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny()
        self.shared = Block(ConvShape(32, 32), [K3, K1, ID])
        self.again = self.shared
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.shared(self.backbone.features(x))))


def test_recurses_into_a_bigger_model_and_keeps_shared_blocks_shared() -> None:
    model = randomize(Segmenter().double()).eval()
    deployed = to_deploy(model)
    x = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), model(x), rtol=1e-10, atol=1e-10)
    assert deployed.shared is deployed.again
    assert isinstance(deployed.shared, FusedBlock)


def test_a_deployed_model_converts_to_a_copy_of_itself() -> None:
    deployed = to_deploy(randomize(tiny()))
    again = to_deploy(deployed)
    assert again is not deployed
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), deployed(x))


def test_compiled_models_in_both_styles() -> None:
    model = randomize(tiny())
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    wrapped = torch.compile(model, backend="eager")
    x = torch.randn(1, 3, 32, 32)
    expected = to_deploy(model)(x)
    for compiled in (in_place, wrapped, nn.Sequential(wrapped)):
        compiled.eval()(x)  # really compiled before the conversion
        deployed = to_deploy(compiled)
        assert torch.equal(deployed(x), expected)
        assert not any("_orig_mod" in key for key in deployed.state_dict())


def test_ddp_wrapped_models(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = randomize(tiny())
        wrapped = DistributedDataParallel(model)
        deployed = to_deploy(wrapped)
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(deployed(x), to_deploy(model)(x))
        assert not any(key.startswith("module.") for key in deployed.state_dict())
    finally:
        dist.destroy_process_group()


class ReluBranch(Branch):
    def __init__(self, shape: ConvShape) -> None:
        super().__init__()
        self.conv = K3(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def test_a_branch_that_is_not_affine_is_named_with_its_layer() -> None:
    model = nn.Sequential(Block(ConvShape(3, 8), [K3]), Block(ConvShape(8, 8), [K3, ReluBranch]))
    with pytest.raises(ValueError, match=r"layer '1\.branches\.1': ReluBranch says of no affine map"):
        to_deploy(model)
    foreign = Block(ConvShape(3, 8), [lambda shape: nn.Conv2d(3, 8, 3, padding=1)])
    with pytest.raises(ValueError, match=r"layer 'branches\.0': Conv2d is not a repvgg\.model\.Branch"):
        to_deploy(foreign)


def test_a_norm_that_cannot_fold_is_named_with_its_layer() -> None:
    model = tiny()
    model.stages[1][0].branches[0].bn = nn.GroupNorm(2, 16)
    with pytest.raises(
        ValueError, match=r"layer 'stages\.1\.0\.branches\.0\.bn': GroupNorm is not a batch normalisation"
    ):
        to_deploy(model)


def test_a_block_left_with_no_branch_is_refused_where_it_is() -> None:
    with pytest.raises(ValueError, match=r"layer 0 .*left with no branch"):
        RepVGG((1, 1, 1, 1), 0.25, 0.25, [ID])
    with pytest.raises(ValueError, match="no identity from"):
        Identity(ConvShape(3, 8))


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_wrong_form_are_refused_even_when_not_strict(strict: bool) -> None:
    model = randomize(tiny())
    deployed = to_deploy(model)
    with pytest.raises(ValueError, match=r"layer 'stem'.*deploy form"):
        model.load_state_dict(deployed.state_dict(), strict=strict)
    with pytest.raises(ValueError, match=r"layer 'stem'.*train form"):
        deployed.load_state_dict(model.state_dict(), strict=strict)
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    assert equivalence(model, twin, torch.randn(2, 3, 32, 32)).max_abs == 0


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_deploy_form_keeps_the_memory_format(layout: torch.memory_format) -> None:
    deployed = to_deploy(tiny().to(memory_format=layout))
    assert memory_format_of(deployed) is layout
    assert all(m.weight.is_contiguous(memory_format=layout) for m in deployed.modules() if isinstance(m, nn.Conv2d))


def test_identity_without_norm_is_exact() -> None:
    block = Block(ConvShape(4, 4), [partial(Identity, norm=False)]).double()
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(to_deploy(block)(x), x.relu())


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_equivalence_reports_precision_and_touches_nothing(ablation: str) -> None:
    model = randomize(tiny(ablation)).train()
    before = copy.deepcopy(model.state_dict())
    proof = equivalence(model, to_deploy(model), torch.randn(4, 3, 32, 32), dtype=torch.float32)
    assert "float32" in str(proof)
    assert 0 < proof.rel_l2 < 1e-4
    assert model.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_channels_last_backward_of_the_stem_does_not_crash() -> None:
    """A strided 1×1 convolution's channels_last backward corrupts the heap on CPU: run stage 0's in a process."""
    script = """
    import torch
    from support.networks import K1, K3
    from repvgg.model import Block, ConvShape
    torch.manual_seed(0)
    block = Block(ConvShape(3, 48, stride=2), [K3, K1]).to(memory_format=torch.channels_last)
    for _ in range(8):
        x = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
        block(x).sum().backward()
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
