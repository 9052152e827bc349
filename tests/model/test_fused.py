"""The fused sum of normalised maps against torch's own operations, layer by layer, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from repvgg.model import Block, BranchFactory, ConvBN, ConvShape, Identity
from repvgg.model.fused import MAX_TERMS, every, normalized_sum, shared, unfused
from support.networks import ABLATIONS, K1, K3, tiny

#: Relative L2 differences that rounding explains.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def is_fused(y: Tensor) -> bool:
    return "NormalizedSum" in str(y.grad_fn)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-30))


def maps_and_norms(
    shape: Sequence[int], normed: Sequence[bool], dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], list[nn.Module]]:
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    maps = [random(*shape) * 3 + random(channels, 1, 1) * 5 for _ in normed]
    norms: list[nn.Module] = []
    for has_norm in normed:
        norm = nn.BatchNorm2d(channels) if has_norm else nn.Identity()
        norm.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(random(channels).abs() + 0.1)
        norms.append(norm)
    return [z.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for z in maps], norms


@pytest.mark.parametrize("dtype", ROUNDING)
@given(
    images=st.integers(1, 5),
    channels=st.sampled_from([1, 3, 8, 16, 17, 40, 64]),
    height=st.integers(1, 20),
    width=st.integers(2, 20),
    normed=st.lists(st.booleans(), min_size=1, max_size=MAX_TERMS).filter(any),
    relu=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_all_results_are_those_of_torchs_layers(
    dtype: torch.dtype,
    images: int,
    channels: int,
    height: int,
    width: int,
    normed: list[bool],
    relu: bool,
    seed: int,
) -> None:
    maps, norms = maps_and_norms((images, channels, height, width), normed, dtype, seed)
    exact_maps = [z.detach().double().requires_grad_() for z in maps]
    exact_norms = [copy.deepcopy(norm).double() for norm in norms]
    y = normalized_sum(maps, norms, relu=relu)
    with unfused():
        exact = normalized_sum(exact_maps, exact_norms, relu=relu)
    assert is_fused(y)
    assert not is_fused(exact)
    assert relative(y, exact) < ROUNDING[dtype]
    # A ReLU's gradient jumps: an element that is rounded across zero says nothing about the arithmetic.
    gradient = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if relu:
        gradient *= ((y > 0) == (exact > 0)).double()
    gradient = gradient.to(dtype).double()
    y.backward(gradient.to(dtype))
    exact.backward(gradient)
    count = images * height * width
    # A normalisation takes out of the gradient what lies along its input: of nearly all of it, rounding remains.
    for z, other, norm in zip(maps, exact_maps, exact_norms, strict=True):
        deviation = other.detach().var((0, 2, 3), correction=0).add(1e-5).sqrt()
        scale = (norm.weight.detach() / deviation).max() if isinstance(norm, nn.BatchNorm2d) else 1
        assert (z.grad.double() - other.grad).norm() < 10 * ROUNDING[dtype] * scale * gradient.norm()
    for norm, other in zip(norms, exact_norms, strict=True):
        for name, value in norm.state_dict().items():
            assert relative(value, other.state_dict()[name]) < ROUNDING[dtype], name
        for parameter, expected in zip(norm.parameters(), other.parameters(), strict=True):
            scale = gradient.norm() * count**0.5
            assert (parameter.grad.double() - expected.grad).norm() < ROUNDING[dtype] * scale


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    subsamples=st.permutations([1, 1, 2]) | st.permutations([1, 3]) | st.sampled_from([[1, 1], [2], [1, 2, 3]]),
    layout=st.sampled_from([torch.channels_last, torch.contiguous_format]),
    spent=st.booleans(),
)
@settings(max_examples=50)
def test_a_map_that_is_shared_has_the_gradient_of_all_its_readers(
    height: int, width: int, subsamples: list[int], layout: torch.memory_format, spent: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, height, width, generator=generator).contiguous(memory_format=layout).requires_grad_()
    other = x.detach().clone().requires_grad_()
    read, expected = shared(x, subsamples, spent=spent), [every(other, n) for n in subsamples]
    weights = [torch.randn(z.shape, generator=generator) for z in expected]
    for a, b in zip(read, expected, strict=True):
        assert torch.equal(a, b)
    # A sum of two does not depend on the order, which is autograd's business; of three it would.
    sum((a * w).sum() for a, w in zip(read, weights, strict=True)).backward()
    sum((b * w).sum() for b, w in zip(expected, weights, strict=True)).backward()
    if len(subsamples) == 2:
        assert torch.equal(x.grad, other.grad)
    torch.testing.assert_close(x.grad, other.grad)


def test_a_strided_block_reads_its_input_once_unless_somebody_listens() -> None:
    block = Block(ConvShape(4, 6, stride=2), [K3, K1]).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()

    def readers() -> set[str]:
        """What the gradient of the input goes through last."""
        nodes, ends = [block(x).grad_fn], set()
        while nodes:
            node = nodes.pop()
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if getattr(following, "variable", None) is x:
                    ends.add(type(node).__name__)
                nodes.append(following)
        return ends

    assert readers() == {"_WholeAndPixelsBackward"}
    heard: list[Tensor] = []
    handle = block.branches[0].register_full_backward_hook(lambda module, gradients, _: heard.append(gradients[0]))
    assert "_WholeAndPixelsBackward" not in readers()
    handle.remove()
    with unfused():
        assert "_WholeAndPixelsBackward" not in readers()


def test_its_gradients_are_the_differences_of_its_values() -> None:
    maps, norms = maps_and_norms((2, 5, 3, 4), [True, False, True], torch.float64, 0)

    def summed(*tensors: Tensor) -> Tensor:
        channels_last = [z.contiguous(memory_format=torch.channels_last) for z in tensors]
        return normalized_sum(channels_last, norms, relu=True)

    assert torch.autograd.gradcheck(summed, maps)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            maps, norms = maps_and_norms((4, 48, 30, 31), [True, True, False], dtype, 0)
            y = normalized_sum(maps, norms, relu=True)
            y.backward(torch.ones_like(y) * y.detach())
            own = [p.grad for norm in norms for p in norm.parameters()]
            results.append([y.detach(), *(z.grad for z in maps), *own, *norms[0].state_dict().values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_what_is_not_finite_stays_so(dtype: torch.dtype, bad: float) -> None:
    maps, norms = maps_and_norms((2, 32, 4, 4), [True, True], dtype, 0)
    with torch.no_grad():
        maps[0][1, 20, 2, 3] = bad
    y = normalized_sum(maps, norms, relu=True)
    assert y[:, 20].isnan().all()
    assert y[:, :20].isfinite().all()
    assert y[:, 21:].isfinite().all()
    assert norms[0].running_mean[20].isfinite().logical_not()
    y.sum().backward()
    assert maps[0].grad[:, 20].isnan().all()


def test_the_gradient_takes_the_place_of_a_map_that_is_spent_and_once_only() -> None:
    maps, norms = maps_and_norms((3, 16, 5, 5), [True, True, False], torch.float64, 1)
    made = [(z.detach() * 1).requires_grad_() * 1 for z in maps]
    weights = torch.randn(maps[0].shape, dtype=torch.float64)
    (normalized_sum(maps, norms, relu=True) * weights).sum().backward()
    addresses = [z.data_ptr() for z in made]
    y = normalized_sum(made, norms, relu=True, spent=[True, False, True])
    loss = (y * weights).sum()
    gradients = torch.autograd.grad(loss, made, retain_graph=True)
    for z, gradient in zip(maps, gradients, strict=True):
        assert torch.equal(z.grad, gradient)
    assert [g.data_ptr() == a for g, a in zip(gradients, addresses, strict=True)] == [True, False, True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, made)


def test_a_map_that_somebody_listens_to_is_not_written_over() -> None:
    net, kept = block(K3, K1), []
    net.branches[0].conv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    y = net(images())
    before = kept[0].detach().clone()
    y.square().sum().backward()
    assert is_fused(y)
    assert torch.equal(kept[0], before)


def test_a_map_that_is_given_twice_gets_both_gradients() -> None:
    (z,), norms = maps_and_norms((3, 16, 5, 5), [True], torch.float64, 1)
    norms.append(nn.Identity())
    exact = z.detach().clone().requires_grad_()
    weights = torch.randn(z.shape, dtype=torch.float64)
    (normalized_sum([z, z], norms, relu=False) * weights).sum().backward()
    with unfused():
        (normalized_sum([exact, exact], norms, relu=False) * weights).sum().backward()
    assert relative(z.grad, exact.grad) < 1e-13


def test_frozen_maps_and_parameters_get_no_gradient() -> None:
    maps, norms = maps_and_norms((2, 16, 4, 4), [True, True], torch.float32, 0)
    maps[1].requires_grad_(False)
    norms[0].requires_grad_(False)
    normalized_sum(maps, norms, relu=True).square().sum().backward()
    assert maps[0].grad is not None
    assert maps[1].grad is None
    assert norms[0].weight.grad is None
    assert norms[1].weight.grad is not None


def test_a_second_derivative_is_an_error_and_not_wrong() -> None:
    maps, norms = maps_and_norms((2, 16, 4, 4), [True], torch.float64, 0)
    (gradient,) = torch.autograd.grad(normalized_sum(maps, norms, relu=False).square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_one_value_per_channel_is_torchs_error() -> None:
    maps, norms = maps_and_norms((1, 16, 1, 1), [True], torch.float32, 0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        normalized_sum(maps, norms, relu=True)


class Doubled(ConvBN):
    """A branch of one's own, which overrides what it is called by."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def block(*branches: partial[ConvBN] | type[ConvBN], **options: object) -> Block:
    return Block(ConvShape(16, 16), branches, **options).to(memory_format=torch.channels_last)  # type: ignore[arg-type]


def images() -> Tensor:
    return torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )


def test_where_somebody_listens_or_a_layer_is_another_torchs_operations_are_taken() -> None:
    x = images()
    assert is_fused(block(K3, K1)(x))
    assert not is_fused(block(K3, Doubled)(x))
    listened = block(K3, K1)
    seen: list[Tensor] = []
    listened.branches[1].bn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert not is_fused(listened(x))
    assert len(seen) == 1
    other = block(K3, K1)
    other.branches[0].bn = nn.GroupNorm(4, 16)
    assert not is_fused(other(x))
    frozen = block(K3, K1)
    frozen.branches[0].bn.eval()
    assert not is_fused(frozen(x))
    assert not is_fused(block(K3, K1).eval()(x))
    assert not is_fused(Block(ConvShape(16, 16), [K3, K1])(x.contiguous()))
    assert not is_fused(block(*[K3] * (MAX_TERMS + 1))(x))


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"se_hidden": 4}, {"norm": True, "se_hidden": 4}])
@pytest.mark.parametrize("ablation", [*ABLATIONS, "qarepvgg"])
def test_a_block_is_the_same_function_either_way(ablation: str, options: dict[str, object]) -> None:
    bare = [K3, partial(ConvBN, kernel_size=1, norm=False), partial(Identity.where_it_fits, norm=False)]
    made = block(*ABLATIONS.get(ablation, bare), **options).double()
    other, x = copy.deepcopy(made), images().double()
    y = made(x)
    with unfused():
        expected = other(x)
    assert relative(y, expected) < 1e-13
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), b in zip(made.named_parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-10 * max(float(b.grad.norm()), 1), name
    for (name, a), b in zip(made.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-13), name


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that a forward keeps for its backward, every storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage.nbytes()
        return tensor


def test_it_keeps_no_more_for_the_backward_than_torchs_layers() -> None:
    kept: list[int] = []
    for context in (unfused, torch.enable_grad):
        net = tiny().to(memory_format=torch.channels_last).train()
        x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        counted = Kept()
        with context(), counted:
            net(x)
        # Maps, that is: a BatchNorm's mean and deviation are kept in float64 here.
        kept.append(sum(size for size in counted.storages.values() if size > 4096))
    assert 0 < kept[1] <= kept[0]


def test_on_fake_tensors_it_has_shapes_alone() -> None:
    with FakeTensorMode():
        maps = [torch.empty(2, 16, 4, 4).to(memory_format=torch.channels_last).requires_grad_()]
        norm = nn.BatchNorm2d(16)
        y = normalized_sum(maps, [norm], relu=True)
        assert is_fused(y)
        y.sum().backward()
        assert maps[0].grad is not None
        assert maps[0].grad.shape == (2, 16, 4, 4)


BARE = partial(Identity.where_it_fits, norm=False)


@pytest.mark.parametrize("branches", [*ABLATIONS.values(), [BARE], [BARE, K3], [BARE, K3, K1], [K3, BARE, BARE]])
def test_without_a_gradient_sums_are_written_over_and_nothing_else(branches: list[BranchFactory]) -> None:
    """A block in eval mode: the same bits, and input and branches' outputs as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block(ConvShape(6, 6), branches).eval()
        x = torch.randn(2, 6, 9, 9)
    expected, before = block(x), x.clone()
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    assert torch.equal(x, before)
    for listened in (block.norm, block.se, block.activation):
        heard: list[Tensor] = []
        handle = listened.register_forward_pre_hook(lambda _, inputs, to=heard: to.append(inputs[0]))
        with torch.inference_mode():
            assert torch.equal(block(x), expected)
        handle.remove()
        assert torch.equal(heard[0].relu(), expected)
        assert heard[0].min() < 0
