"""Whatever a layer of a branch does is folded, or the conversion is refused with the layer's name."""

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import yaml
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from repvgg.cli import ROOT
from repvgg.model import (
    Activated,
    Block,
    ConvBN,
    ConvShape,
    FoldedBlock,
    FusedBlock,
    Identity,
    NotAffineError,
    conv_as_affine,
    equivalence,
    norm_as_affine,
    to_deploy,
)
from support.networks import ID, K1, K3, randomize, tiny

DESIGNS = sorted(file.stem for file in (ROOT / "conf" / "ablation").glob("*.yaml"))
SHAPE = ConvShape(8, 8)


def a_block(shape: ConvShape = SHAPE) -> Block:
    torch.manual_seed(0)
    return randomize(Block(shape, [K3, K1, ID]).double())


def images(shape: ConvShape = SHAPE) -> Tensor:
    return torch.randn(2, shape.in_channels, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def difference(block: nn.Module, x: Tensor) -> float:
    """Of both forms, relative; the deploy form is made first, before a forward could refresh a computed weight."""
    deployed = to_deploy(block)
    with torch.no_grad():
        wanted = copy_of(block).eval()(x)
        return float((deployed(x) - wanted).norm() / wanted.norm())


def copy_of(block: nn.Module) -> nn.Module:
    """Of a pruned module deepcopy makes none: its weight is computed."""
    for module in block.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.detach())
    return copy.deepcopy(block)


def step(layer: nn.Module) -> None:
    """Move every parameter, as an optimizer does: what a hook computed from them before is old now."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.5)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's, detectron2's and DETR's are written: buffers alone, and the formula."""

    def __init__(self, norm: nn.BatchNorm2d, eps: float | None = None) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        self._eps = norm.eps if eps is None else eps
        if eps is None:
            self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self._eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class OwnFormula(nn.BatchNorm2d):
    """Normalises by its running statistics in training too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class RectifyingFrozen(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OnlyRenamed(nn.Conv2d):
    """A subclass that computes as its base does."""


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def first(block: Block) -> ConvBN:
    return block.branches[0]  # type: ignore[return-value]


def fused(block: Block) -> None:
    branch = first(block).eval()
    branch.conv, branch.bn = fuse_conv_bn_eval(branch.conv, branch.bn), nn.Identity()


def replace_conv(block: Block, **options: object) -> None:
    first(block).conv = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, "bias": False, **options}).double()  # type: ignore[arg-type]


def replace_norm(block: Block, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    first(block).bn = make(first(block).bn)


def retyped(layer: nn.Module, kind: type[nn.Module]) -> None:
    layer.__class__ = kind


def pruned(block: Block) -> None:
    for layer, name in ((first(block).conv, "weight"), (first(block).bn, "bias")):
        prune.random_unstructured(layer, name, amount=0.5)
        step(layer)


def pruned_twice(block: Block) -> None:
    prune.l1_unstructured(first(block).conv, "weight", amount=0.3)
    prune.ln_structured(first(block).conv, "weight", amount=0.3, n=2, dim=0)
    step(first(block).conv)


def old_weight_norm(block: Block) -> None:
    weight_norm(first(block).conv)
    step(first(block).conv)


def old_spectral_norm(block: Block) -> None:
    spectral_norm(first(block).conv)
    step(first(block).conv)


def new_spectral_norm(block: Block) -> None:
    parametrizations.spectral_norm(first(block).conv)
    step(first(block).conv)


def set_forward(module: nn.Module) -> None:
    module.forward = lambda x: x * 2  # type: ignore[method-assign]


def zeroed(norm: FrozenBatchNorm2d) -> FrozenBatchNorm2d:
    norm.weight.zero_()
    return norm


FOLDED: dict[str, Callable[[Block], object]] = {
    "a bias after a fusion": fused,
    "a bias beside a BatchNorm": lambda b: replace_conv(b, bias=True),
    "a larger kernel": lambda b: replace_conv(b, kernel_size=5, padding=2),
    "padding='same'": lambda b: replace_conv(b, padding="same"),
    "a 1x1 that pads with nothing": lambda b: replace_conv(b, kernel_size=1, padding=0, padding_mode="reflect"),
    "Sequential": lambda b: setattr(first(b), "conv", nn.Sequential(nn.Sequential(first(b).conv), nn.Dropout2d())),
    "Sequential of convolution and norm": lambda b: setattr(
        first(b), "conv", nn.Sequential(first(b).conv, copy.deepcopy(first(b).bn))
    ),
    "norms one after another": lambda b: replace_norm(b, lambda bn: nn.Sequential(bn, copy.deepcopy(bn))),
    "FrozenBatchNorm2d": lambda b: replace_norm(b, FrozenBatchNorm2d),
    "FrozenBatchNorm2d without eps": lambda b: replace_norm(b, partial(FrozenBatchNorm2d, eps=1e-5)),
    "a frozen subclass": lambda b: retyped(first(b).bn, OwnFormula),
    "a frozen subclass, pruned": lambda b: (retyped(first(b).bn, OwnFormula), pruned(b)),
    "a frozen norm that scales all by 0": lambda b: replace_norm(b, lambda bn: zeroed(FrozenBatchNorm2d(bn))),
    "SyncBatchNorm": lambda b: replace_norm(b, nn.SyncBatchNorm.convert_sync_batchnorm),
    "affine=False": lambda b: replace_norm(b, lambda bn: nn.BatchNorm2d(8, affine=False).double()),
    "no bias of a norm": lambda b: first(b).bn.register_parameter("bias", None),
    "no more statistics from now on": lambda b: setattr(first(b).bn, "track_running_stats", False),
    "a subclass without a forward": lambda b: retyped(first(b).conv, OnlyRenamed),
    "pruned, and a step": pruned,
    "pruned twice, and a step": pruned_twice,
    "weight_norm": lambda b: parametrizations.weight_norm(first(b).conv),
    "weight_norm by a hook, and a step": old_weight_norm,
    "spectral_norm, and a step": new_spectral_norm,
    "spectral_norm by a hook, and a step": old_spectral_norm,
    "a parametrized norm": lambda b: register_parametrization(first(b).bn, "weight", Doubled()),
    "a compiled branch": lambda b: b.branches.__setitem__(0, torch.compile(first(b), backend="eager")),
    "a compiled convolution": lambda b: setattr(first(b), "conv", torch.compile(first(b).conv, backend="eager")),
    "a block norm that is no map": lambda b: setattr(b, "norm", nn.GroupNorm(2, 8).double()),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", FOLDED)
def test_what_folds(what: str, training: bool) -> None:
    block = a_block()
    FOLDED[what](block)
    block.train(training)
    assert difference(block, images()) < 1e-10


class Rectifying(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class RectifyingBranch(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class BeforeNorm(ConvBN):
    def before_norm(self, x: Tensor) -> Tensor:
        return super().before_norm(x).abs()


class ScaledBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CONV = r"layer 'branches\.0\.conv': "
NORM = r"layer 'branches\.0\.bn': "
BRANCH = r"layer 'branches\.0': "
REFUSED: dict[str, tuple[Callable[[Block], object], str]] = {
    **{
        f"padding_mode={mode}": (
            lambda b, mode=mode: replace_conv(b, padding_mode=mode),
            rf"{CONV}Conv2d has padding_mode='{mode}' where its branch folds padding_mode='zeros'",
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "another padding": (lambda b: replace_conv(b, kernel_size=5), CONV + r"Conv2d has padding=\(1, 1\) where"),
    "another dilation": (lambda b: replace_conv(b, dilation=2, padding=2), CONV + r"Conv2d has dilation=\(2, 2\)"),
    "other groups": (lambda b: replace_conv(b, groups=2), CONV + "Conv2d has groups=2 where"),
    "a forward of its own": (
        lambda b: retyped(first(b).conv, Standardized),
        CONV + r"Standardized overrides Conv2d\.f",
    ),
    "another layer": (lambda b: setattr(first(b), "conv", nn.ConvTranspose2d(8, 8, 1)), CONV + "ConvTranspose2d is no"),
    "a ReLU in a Sequential": (
        lambda b: setattr(first(b), "conv", nn.Sequential(first(b).conv, nn.ReLU())),
        r"layer 'branches\.0\.conv\.1': ReLU is not a batch normalisation",
    ),
    "nothing in a Sequential": (lambda b: setattr(first(b), "conv", nn.Sequential()), CONV + "Sequential is no Conv2d"),
    "a norm that rectifies": (
        lambda b: retyped(first(b).bn, Rectifying),
        NORM + "Rectifying computes something else than a BatchNorm",
    ),
    "a frozen norm that rectifies": (
        lambda b: replace_norm(b, RectifyingFrozen),
        NORM + "RectifyingFrozen computes something else than a BatchNorm",
    ),
    "a frozen norm with a hidden eps": (
        lambda b: replace_norm(b, partial(FrozenBatchNorm2d, eps=1e-3)),
        NORM + "FrozenBatchNorm2d computes something else",
    ),
    "no statistics": (
        lambda b: replace_norm(b, lambda bn: nn.BatchNorm2d(8, track_running_stats=False).double()),
        NORM + r"BatchNorm2d keeps no running statistics \(track_running_stats=False\)",
    ),
    "a forward set on a layer": (lambda b: set_forward(first(b).conv), CONV + r"Conv2d has a forward\(\) of its own"),
    "a forward set on a branch": (lambda b: set_forward(first(b)), BRANCH + r"ConvBN computes with a forward\(\)"),
    "a forward set on the block": (set_forward, r"this block: Block computes with a forward\(\) of its own"),
    "a subclass of a branch": (
        lambda b: retyped(first(b), RectifyingBranch),
        BRANCH + "RectifyingBranch computes with",
    ),
    "a part of its forward": (
        lambda b: retyped(first(b), BeforeNorm),
        BRANCH + r"BeforeNorm computes .*before_norm\(\)",
    ),
    "a subclass of the block": (
        lambda b: retyped(b, ScaledBlock),
        r"this block: ScaledBlock computes .* Give the class",
    ),
    "a subclass in a wrapper": (
        lambda b: b.branches.__setitem__(0, Activated(RectifyingBranch(SHAPE).double())),
        r"layer 'branches\.0\.branch': RectifyingBranch computes with a forward\(\)",
    ),
    "another shape of the block": (
        lambda b: setattr(b, "shape", ConvShape(8, 8, 2)),
        BRANCH + r"ConvBN is of ConvShape\(.*stride=1.*its block of ConvShape\(.*stride=2",
    ),
    "no real numbers": (
        lambda b: setattr(first(b).conv, "weight", nn.Parameter(first(b).conv.weight.to(torch.complex64))),
        CONV + r"Conv2d has a kernel of torch\.complex64",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_with_the_layers_name(what: str) -> None:
    block = a_block()
    surgery, message = REFUSED[what]
    surgery(block)
    with pytest.raises(NotAffineError, match=message):
        to_deploy(block)


def test_the_name_is_that_of_the_whole_model() -> None:
    model = tiny()
    model.stages[1][0].branches[0].bn = Rectifying(16)
    with pytest.raises(NotAffineError, match=r"layer 'stages\.1\.0\.branches\.0\.bn': Rectifying"):
        to_deploy(model)


@settings(max_examples=150, deadline=None)
@given(
    branch=st.sampled_from([0, 1]),
    kernel=st.sampled_from([1, 2, 3, 5]),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect"]),
    bias=st.booleans(),
    shape=st.sampled_from([SHAPE, ConvShape(8, 8, 2), ConvShape(8, 8, 1, 2), ConvShape(8, 8, 1, 1, 2)]),
)
def test_any_convolution_is_right_or_refused(
    branch, kernel, padding, stride, dilation, groups, mode, bias, shape
) -> None:
    if padding == "same" and stride > 1:
        return  # torch has no such layer
    block = a_block(shape).eval()
    options = {"padding": padding, "dilation": dilation, "padding_mode": mode, "groups": groups, "bias": bias}
    block.branches[branch].conv = nn.Conv2d(8, 8, kernel, stride, **options).double()
    x = images(shape)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of even kernels and padding="same"
            wanted = block(x)
    except RuntimeError:
        return  # maps that cannot be added, in the train form already
    deployed, refused = None, ""
    try:
        deployed = to_deploy(block)
    except ValueError as error:
        refused = str(error)
    if deployed is None:
        assert f"branches.{branch}.conv" in refused or "kernel" in refused
        plain = (kernel % 2, stride, dilation, groups) == (1, shape.stride, shape.dilation, shape.groups)
        assert not (plain and branch == 0 and mode == "zeros" and padding == shape.dilation * (kernel // 2))
        return
    with torch.no_grad():
        assert (deployed(x) - wanted).norm() < 1e-10 * wanted.norm()


def layers_of(block: Block) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)]


def with_bias(conv: nn.Conv2d) -> None:
    conv.bias = nn.Parameter(torch.randn(conv.out_channels, dtype=torch.float64))


def pruned_and_moved(conv: nn.Conv2d) -> None:
    prune.random_unstructured(conv, "weight", amount=0.3)
    step(conv)


EVERYWHERE: dict[str, Callable[[nn.Conv2d], object]] = {
    "a bias": with_bias,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": pruned_and_moved,
    "reflect": lambda conv: setattr(conv, "padding_mode", "reflect"),
}


@pytest.mark.parametrize("what", EVERYWHERE)
@pytest.mark.parametrize("name", DESIGNS)
def test_every_layer_of_every_design_is_right_or_refused(name: str, what: str) -> None:
    node = instantiate(yaml.safe_load((ROOT / "conf" / "ablation" / f"{name}.yaml").read_text()), _convert_="all")

    def made() -> Block:
        torch.manual_seed(0)
        block = randomize(Block(SHAPE, node["branches"], norm=node["norm"]).double())
        for conv in layers_of(block):  # some begin at 0, which has no direction
            nn.init.normal_(conv.weight)
        return block

    for number in range(len(layers_of(made()))):
        block = made()
        layer = layers_of(block)[number]
        where = next(inner for inner, module in block.named_modules() if module is layer)
        EVERYWHERE[what](layer)
        apart, refused = 0.0, ""
        try:
            apart = difference(block, images())
        except NotAffineError as error:
            refused = str(error)
        assert apart < 1e-10, where
        # A bias and a parametrization fold everywhere. A hook that nothing calls, or a padding of images, cannot.
        assert not refused or (what in ("pruned", "reflect") and f"layer '{where}': " in refused)


def test_pruning_and_spectral_norm_stay_as_they_were() -> None:
    block = a_block().train()
    pruned(block)
    parametrizations.spectral_norm(block.branches[1].conv)
    step(block.branches[1].conv)
    computed = first(block).conv.weight
    before, modes = copy.deepcopy(dict(block.state_dict())), [m.training for m in block.modules()]
    to_deploy(block)
    assert first(block).conv.weight is computed
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())
    assert [m.training for m in block.modules()] == modes


def test_a_pruned_head_and_attention_are_copied() -> None:
    model = nn.Sequential(Block(SHAPE, [K3], se_hidden=2), nn.Flatten(), nn.Linear(8 * 70, 3)).double()
    for layer in (model[0].se.down, model[2]):
        prune.random_unstructured(layer, "weight", amount=0.5)
        step(layer)
    assert equivalence(model, to_deploy(model), images()).rel_l2 < 1e-10


def test_folding_is_differentiable_through_a_parametrization() -> None:
    block = a_block()
    parametrizations.weight_norm(first(block).conv)
    block.affine().kernel.sum().backward()
    assert all(p.grad is not None for p in first(block).conv.parameters())


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_is_warned_of_with_its_layer(register: str) -> None:
    model = nn.Sequential(a_block(), a_block())
    for layer in (model[1], model[1].branches[2].bn, model[0].activation):
        getattr(layer, register)(lambda *_: None)
    prune.random_unstructured(model[0].branches[0].conv, "weight", amount=0.5)  # its hook is computed through
    with pytest.warns(UserWarning, match=r"hooks are not carried over .* 1, 1\.branches\.2\.bn$") as caught:
        deployed = to_deploy(model)
    assert len(caught) == 1
    assert type(deployed[0].activation) is nn.ReLU
    assert not deployed[0].activation.inplace  # the copy, with the hook that it has
    hooks = (deployed[0].activation._forward_hooks, deployed[0].activation._forward_pre_hooks)
    assert any(hooks) or deployed[0].activation._backward_hooks


@pytest.mark.parametrize("design", ["full", "relu_branch"])
def test_a_frozen_layer_stays_frozen(design: str) -> None:
    node = instantiate(yaml.safe_load((ROOT / "conf" / "ablation" / f"{design}.yaml").read_text()), _convert_="all")
    model = nn.Sequential(*(Block(SHAPE, node["branches"]) for _ in range(3)))
    model[0].requires_grad_(False)
    model[1].branches[0].requires_grad_(False)  # the others train on, and with them their sum
    deployed = to_deploy(model)
    for block, trains in zip(deployed, (False, True, True), strict=True):
        assert isinstance(block, FusedBlock | FoldedBlock)
        assert {p.requires_grad for p in block.parameters()} == {trains}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_branches_outside_of_a_block_are_said_to_be_unconverted() -> None:
    model, x = tiny().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        copies = [torch.fx.symbolic_trace(model), torch.jit.trace(model, x)]
    names = r"stem\.branches\.0, stem\.branches\.1, stages\.0\.0\.branches\.0 …$"
    for traced in copies:
        with pytest.warns(UserWarning, match="stay unconverted: " + names):
            assert torch.equal(to_deploy(traced)(x), model(x))
    with pytest.warns(UserWarning, match=r"stay unconverted: 0\.branches\.0, 0\.branches\.1, 0\.branches\.2$"):
        to_deploy(nn.Sequential(torch.fx.symbolic_trace(a_block().eval()), a_block()))
    with pytest.warns(UserWarning, match="stay unconverted: ConvBN"):
        to_deploy(ConvBN(SHAPE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = to_deploy(to_deploy(model))
        inception = nn.Sequential(nn.ModuleDict({"branches": nn.ModuleList([nn.Conv2d(3, 3, 1)])}))
        to_deploy(inception)
    assert isinstance(again.stem, FusedBlock)


def test_the_precision_is_that_of_the_convolution() -> None:
    """BatchNorms that mixed-precision training keeps in float32 may come first."""
    block = randomize(Block(SHAPE, [ID, K3]))
    block.branches[1].conv.to(torch.bfloat16)
    assert to_deploy(block).conv.weight.dtype is torch.bfloat16


def test_readers_know_what_they_read() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(NotAffineError, match="Identity is not a batch normalisation") as caught:
        norm_as_affine(identity := nn.Identity(), like)
    assert caught.value.layer is identity
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=2).double()
    affine = conv_as_affine(conv, torch.float64, like.device, stride=2, groups=2)
    assert torch.equal(affine.kernel, conv.weight)
    assert torch.equal(affine.bias, conv.bias)
    assert Identity(SHAPE).affine(torch.float64, like.device).shape == (8, 8, 1, 1)
