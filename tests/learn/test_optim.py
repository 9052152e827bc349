"""What is decayed, the learning rate of every step, and the share of every device."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.learn.optim import batch_per_device, fused_l2, parameter_groups, scaled_lr, warmup_then_cosine
from repvgg.model import Block, ConvBN, ConvShape, RepVGG
from support.networks import ID, K1, K3, randomize, tiny
from support.training import classifier


def test_kernels_are_decayed_and_nothing_else() -> None:
    model = tiny(squeeze_excite=False)
    names = {id(p): n for n, p in model.named_parameters()}
    kernels, rest = parameter_groups(model, 1e-4)
    assert kernels["weight_decay"] == 1e-4
    assert rest["weight_decay"] == 0
    decayed = {names[id(p)] for p in kernels["params"]}
    assert decayed == {n for n in names.values() if n.endswith("conv.weight") or n == "head.weight"}
    # the γ of the identity's BatchNorm, which choosing by name gets wrong
    assert "stages.1.1.branches.2.bn.weight" in {names[id(p)] for p in rest["params"]}
    assert len(kernels["params"]) + len(rest["params"]) == len(names)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert [len(g["params"]) for g in parameter_groups(model, 0.1)] == [1, 1]


SWITCHES = {"decay_identity_gamma": True, "bias_lr_factor": 2.0, "custom_l2": True}
#: B0 has 28 blocks, 23 with an identity: 3×3 and 1×1 kernels, and of 79 BatchNorms a γ and a β each; and the head.
BLOCKS, IDENTITIES = 28, 23
NORMS = 2 * BLOCKS + IDENTITIES
DECAYED, PLAIN = (1e-4, 0.1), (0.0, 0.1)


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, {"kernels": (*DECAYED, 2 * BLOCKS + 1), "rest": (*PLAIN, 2 * NORMS + 1)}),
        (
            {"decay_identity_gamma": True},
            {
                "kernels": (*DECAYED, 2 * BLOCKS + 1),
                "identity_gammas": (*DECAYED, IDENTITIES),
                "rest": (*PLAIN, 2 * NORMS + 1 - IDENTITIES),
            },
        ),
        (
            {"bias_lr_factor": 2.0},
            {
                "kernels": (*DECAYED, 2 * BLOCKS + 1),
                "biases": (0.0, 0.2, NORMS + 1),
                "rest": (*PLAIN, NORMS),
            },
        ),
        (
            {"custom_l2": True},
            {"kernels": (*DECAYED, 1), "fused_kernels": (*PLAIN, 2 * BLOCKS), "rest": (*PLAIN, 2 * NORMS + 1)},
        ),
        (
            SWITCHES,
            {
                "kernels": (*DECAYED, 1),
                "fused_kernels": (*PLAIN, 2 * BLOCKS),
                "identity_gammas": (*DECAYED, IDENTITIES),
                "biases": (0.0, 0.2, NORMS + 1),
                "rest": (*PLAIN, NORMS - IDENTITIES),
            },
        ),
    ],
    ids=lambda value: "+".join(value) if value else "paper",
)
def test_the_groups_of_b0(switches: dict, expected: dict[str, tuple[float, float, int]]) -> None:
    with torch.device("meta"):
        model = RepVGG((4, 6, 16, 1), 1, 2.5, [K3, K1, ID])
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4, lr=0.1, **switches), lr=0.1, momentum=0.9)
    groups = {g["name"]: (g["weight_decay"], g["lr"], len(g["params"])) for g in optimizer.param_groups}
    assert groups == expected
    every = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())  # once each


def test_a_bias_factor_without_a_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="bias_lr_factor=2 multiplies a learning rate"):
        parameter_groups(tiny(), 0.1, bias_lr_factor=2)


def official_custom_l2(k3: Tensor, t3: Tensor, k1: Tensor, t1: Tensor) -> Tensor:
    """The authors' formula as it stands in their repository: K3 is O×I×3×3, K1 O×I×1×1, t is O."""
    t3, t1 = t3[:, None, None], t1[:, None, None]
    centre = k3[:, :, 1, 1]
    ring = (k3**2).sum() - (centre**2).sum()
    equivalent = centre * t3[:, 0] + k1[:, :, 0, 0] * t1[:, 0]
    return ring + (equivalent**2 / (t3[:, 0] ** 2 + t1[:, 0] ** 2)).sum()


def scale_of(branch: ConvBN) -> Tensor:
    return branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt()


@pytest.mark.parametrize("ablation", ["1x1", "full"])
def test_custom_l2_is_the_authors(ablation: str) -> None:
    """Value and gradients, in float64; their formula ignores the identity, and takes t as a constant."""
    model = randomize(tiny(ablation, groups=2).double())
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    kernels = [branch.conv.weight for block in blocks for branch in block.branches[:2]]
    expected = sum(
        official_custom_l2(
            b.branches[0].conv.weight, scale_of(b.branches[0]).detach(), b.branches[1].conv.weight,
            scale_of(b.branches[1]).detach(),
        )
        for b in blocks
    )  # fmt: skip
    ours = fused_l2(model)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(ours, kernels), torch.autograd.grad(expected, kernels), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert not torch.autograd.grad(fused_l2(model), [b.branches[0].bn.weight for b in blocks], allow_unused=True)[0]


@pytest.mark.parametrize("ablation", ["plain", "id"])
def test_custom_l2_of_one_kernel_is_weight_decay(ablation: str) -> None:
    model = randomize(tiny(ablation).double())
    expected = sum((b.branches[0].conv.weight ** 2).sum() for b in model.modules() if isinstance(b, Block))
    assert fused_l2(model).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("norm", [True, False])
def test_custom_l2_is_the_cheapest_way_to_make_the_fused_kernel(norm: bool) -> None:
    """Of five branches of unlike sizes: the least squares solution for the same fused kernel, by pseudo-inverse."""
    makes = [K3, K3, K1, partial(ConvBN, kernel_size=5), partial(ConvBN, kernel_size=1, norm=False), ID]
    block = randomize(Block(ConvShape(4, 4), makes, norm=norm).double())
    convs = [branch for branch in block.branches if isinstance(branch, ConvBN)]
    identity = Block(ConvShape(4, 4), [ID]).double()
    identity.branches[0].load_state_dict(block.branches[-1].state_dict())
    without = Block(ConvShape(4, 4), makes[:-1]).double()
    without.branches.load_state_dict({k: v for k, v in block.branches.state_dict().items() if not k.startswith("5.")})
    fused = without.affine().kernel
    expected = 0.0
    for o in range(4):
        for i, y, x in ((i, y, x) for i in range(4) for y in range(5) for x in range(5)):
            reach = [b for b in convs if max(abs(y - 2), abs(x - 2)) <= b.conv.kernel_size[0] // 2]
            row = torch.stack([torch.ones(()).double() if b.bn is None or isinstance(b.bn, nn.Identity)
                               else scale_of(b)[o] for b in reach])[None]  # fmt: skip
            expected += (torch.linalg.pinv(row) @ fused[o, i, y, x].reshape(1, 1)).square().sum().item()
    assert fused_l2(block).item() == pytest.approx(expected, rel=1e-10)


def test_custom_l2_moves_the_kernels_by_its_gradient() -> None:
    """One step of the module: the cross-entropy's gradient plus weight_decay × half the penalty's."""
    steps = []
    for custom in (True, False):
        torch.manual_seed(0)
        module = classifier(randomize(tiny(num_classes=10)), custom_l2=custom, weight_decay=1e-2).double()
        module._trainer = _Trainer(module)
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        kernel = module.net.stages[1][1].branches[0].conv.weight
        loss = module.training_step((images, torch.arange(4)), 0)
        penalty = torch.autograd.grad(0.5 * 1e-2 * fused_l2(module.net), kernel)[0]  # the forward has moved σ
        steps.append((loss, torch.autograd.grad(loss, kernel)[0], penalty, module.train_scores["loss"].compute()))
    (with_it, gradient, penalty, logged), (without, plain, _, logged_without) = steps
    assert with_it > without
    torch.testing.assert_close(gradient, plain + penalty, rtol=1e-6, atol=1e-10)
    assert logged == logged_without


class _Trainer:
    """What training_step asks of a trainer when nothing is logged."""

    def __init__(self, module: nn.Module) -> None:
        module.log = lambda *args, **kwargs: None
        self.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]


def test_a_channel_whose_gammas_are_zero_gives_no_nan() -> None:
    model = tiny("1x1")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    penalty = fused_l2(model)
    penalty.backward()
    assert penalty == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0), (100, 10), (7, 3)])
def test_learning_rate_of_every_step(steps: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = warmup_then_cosine(optimizer, steps, warmup)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for i, rate in enumerate(rates):
        if i < warmup:
            expected = 0.1 * (0.01 + 0.99 * i / warmup)
        else:
            expected = 0.05 * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
        assert rate == pytest.approx(expected, rel=1e-9), i
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_warmup_longer_than_training_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="warm-up of 5 steps does not fit into 5"):
        warmup_then_cosine(optimizer, 5, 5)


def test_lr_follows_the_batch_linearly() -> None:
    assert scaled_lr(0.1, 256, 256) == 0.1
    assert scaled_lr(0.1, 256, 2048) == pytest.approx(0.8)


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 8))
def test_every_device_gets_an_equal_share_or_the_user_is_told(batch: int, devices: int, accumulate: int) -> None:
    try:
        share = batch_per_device(batch, devices, accumulate)
    except ValueError as error:
        assert batch % (devices * accumulate) != 0
        suggested = int(str(error).rsplit(" ", 1)[1].removeprefix("recipe.batch_size="))
        assert batch_per_device(suggested, devices, accumulate) >= 1
    else:
        assert share * devices * accumulate == batch
