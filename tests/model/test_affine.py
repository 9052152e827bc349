"""Laws of the affine algebra, in float64 against what torch computes for the maps themselves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.model import Affine, ConvBN, ConvShape, identity_map
from support.networks import randomize

ODD = st.sampled_from([1, 3, 5, 7])


def random_affine(rng: torch.Generator, height: int, width: int, channels: int = 4, groups: int = 1) -> Affine:
    kernel = torch.randn(channels, channels // groups, height, width, generator=rng, dtype=torch.float64)
    return Affine(kernel, torch.randn(channels, generator=rng, dtype=torch.float64))


def apply(affine: Affine, x: Tensor, *, groups: int = 1, dilation: int = 1, stride: int = 1) -> Tensor:
    height, width = affine.kernel.shape[2:]
    padding = (dilation * (height // 2), dilation * (width // 2))
    return F.conv2d(x, affine.kernel, affine.bias, stride, padding, dilation, groups)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(ODD, ODD, ODD, ODD),
    groups=st.sampled_from([1, 2, 4]),
    dilation=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2]),
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
def test_sum_of_maps_is_the_map_of_the_sum(sizes, groups, dilation, stride, image, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    a = random_affine(rng, sizes[0], sizes[1], groups=groups)
    b = random_affine(rng, sizes[2], sizes[3], groups=groups)
    x = torch.randn(2, 4, *image, generator=rng, dtype=torch.float64)
    how = {"groups": groups, "dilation": dilation, "stride": stride}
    torch.testing.assert_close(apply(a + b, x, **how), apply(a, x, **how) + apply(b, x, **how), rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), affine_parameters=st.booleans())
def test_map_then_batchnorm_is_a_map(seed: int, affine_parameters: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    a = random_affine(rng, 3, 3)
    norm = nn.BatchNorm2d(4, affine=affine_parameters).double().eval()
    norm.running_mean.copy_(torch.randn(4, generator=rng))
    norm.running_var.copy_(torch.rand(4, generator=rng) + 0.1)
    x = torch.randn(2, 4, 5, 6, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(apply(a, x))
    torch.testing.assert_close(apply(a.then_norm(norm), x), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(ODD, ODD),
    groups=st.sampled_from([1, 2, 4]),
    dilation=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2]),
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
def test_a_pointwise_map_then_another_is_a_map(size, groups, dilation, stride, image, seed) -> None:
    """The image is padded before the first map, which makes its bias of the zeros."""
    rng = torch.Generator().manual_seed(seed)
    inner, outer = random_affine(rng, 1, 1, groups=groups), random_affine(rng, *size, groups=groups)
    x = torch.randn(2, 4, *image, generator=rng, dtype=torch.float64)
    rows, columns = (dilation * (k // 2) for k in size)
    between = apply(inner, F.pad(x, (columns, columns, rows, rows)), groups=groups)
    expected = F.conv2d(between, outer.kernel, outer.bias, stride, 0, dilation, groups)
    how = {"groups": groups, "dilation": dilation, "stride": stride}
    torch.testing.assert_close(apply(inner.then(outer, groups), x, **how), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_identity_map_is_the_identity(groups: int) -> None:
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    identity = identity_map(8, groups, dtype=torch.float64, device=x.device)
    assert torch.equal(apply(identity, x, groups=groups), x)


def test_even_kernels_wrong_biases_and_foreign_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="4x4 kernel has no centre"):
        Affine(torch.zeros(2, 2, 4, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="bias of shape"):
        Affine(torch.zeros(2, 2, 3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="shape \\(2, 2\\)"):
        Affine(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="not of one block"):
        _ = Affine(torch.zeros(2, 2, 3, 3), torch.zeros(2)) + Affine(torch.zeros(2, 1, 1, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="only a 1x1 kernel"):
        Affine(torch.zeros(2, 2, 3, 3), torch.zeros(2)).then(Affine(torch.zeros(2, 2, 1, 1), torch.zeros(2)))
    with pytest.raises(ValueError, match="2 outputs for a kernel"):
        Affine(torch.zeros(2, 2, 1, 1), torch.zeros(2)).then(Affine(torch.zeros(2, 4, 3, 3), torch.zeros(2)))
    with pytest.raises(ValueError, match="kernel_size=2 is not odd"):
        ConvBN(ConvShape(2, 2), kernel_size=2)


def test_only_batchnorms_with_statistics_fold() -> None:
    a = random_affine(torch.Generator().manual_seed(0), 3, 3)
    with pytest.raises(ValueError, match="GroupNorm is not a batch normalisation"):
        a.then_norm(nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="no running statistics"):
        a.then_norm(nn.BatchNorm2d(4, track_running_stats=False))


def test_folding_is_differentiable() -> None:
    branch = randomize(ConvBN(ConvShape(3, 3)).double())
    affine = branch.affine(torch.float64, torch.device("cpu"))
    (affine.kernel.sum() + affine.bias.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.parameters())
