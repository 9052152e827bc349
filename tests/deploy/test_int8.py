"""The deploy form in int8, by both backends."""

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg.deploy import int8, int8_options
from repvgg.deploy.export import export_onnx
from repvgg.deploy.int8 import Int8Network, LayerNoise, noise, quantize, quantize_onnx, sums_saturate
from repvgg.deploy.int8_options import METHODS, require_int8
from repvgg.deploy.runtimes import load_program
from repvgg.model import to_deploy
from support.networks import randomize, tiny

#: Whether oneDNN is told to use less than the processor has, and so may saturate where the processor need not.
LIMITED = bool({"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & set(os.environ))
BACKENDS = sorted(METHODS)
#: Where one backend will do for most commits: an export to ONNX takes seconds.
MOSTLY_TORCH = [pytest.param("onnxruntime", marks=pytest.mark.slow), "torch"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return to_deploy(randomize(tiny(num_classes=10)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quantized(net: nn.Module, images: Tensor) -> dict[str, Int8Network]:
    return {backend: quantize(net, images.split(16), backend=backend) for backend in BACKENDS}


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight.detach() for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def rounded(weight: Tensor, *, per_channel: bool = True) -> np.ndarray:
    """Symmetric rounding to −127 … 127 in plain numpy: what int8 weights are, by definition."""
    w = weight.double().numpy()
    largest = np.abs(w).max(axis=tuple(range(1, w.ndim)) if per_channel else None, keepdims=True)
    steps = np.round(w / (largest / 127))
    assert np.abs(steps).max() == 127
    return steps * (largest / 127)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_rounded_symmetrically_per_output_channel(
    backend: str, net: nn.Module, images: Tensor, quantized: dict[str, Int8Network]
) -> None:
    layers = quantized[backend].layers(images[:2])
    given = weights(net)
    assert list(layers) == list(given)
    for name, layer in layers.items():
        np.testing.assert_allclose(layer.weight, rounded(given[name]), rtol=2e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
def test_one_scale_for_a_tensor_is_the_comparison_that_it_claims_to_be(
    backend: str, net: nn.Module, images: Tensor
) -> None:
    layers = quantize(net, [images[:4]], backend=backend, per_channel=False).layers(images[:2])
    for name, weight in weights(net).items():
        expected = rounded(weight, per_channel=False)
        np.testing.assert_allclose(layers[name].weight, expected, rtol=2e-6, atol=1e-9, err_msg=name)


def test_both_backends_compute_one_network(images: Tensor, quantized: dict[str, Int8Network], net: nn.Module) -> None:
    """Two independent libraries, the same scales by minimum and maximum: they differ by single steps of rounding."""
    a, b = (quantized[backend](images) for backend in BACKENDS)
    exact = net(images).detach()
    if not sums_saturate():  # which is more than rounding
        assert (a - b).norm() < 0.5 * (a - exact).norm()
    assert 1e-4 < (a - exact).norm() / exact.norm() < 0.05


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), steps=st.lists(st.integers(-127, 127), min_size=18, max_size=18))
def test_what_eight_bits_hold_is_computed_exactly(seed: int, steps: list[int]) -> None:
    """Weights that are multiples of max/127, inputs of 1/255 that span 0 … 1: only float32's rounding is lost."""
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    kernel = torch.tensor(steps, dtype=torch.float64).reshape(1, 2, 3, 3)
    kernel[0, 0, 0, 0] = 127  # the largest
    with torch.no_grad():
        conv.weight.copy_(torch.cat([kernel / 127, -3 * kernel / 127]))
        conv.bias.zero_()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 2, 5, 5), generator=generator).double() / 255
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    logits = quantize(conv.eval(), [images], backend="torch")(images)
    assert (logits - conv(images)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
def test_rounding_is_all_that_int8_costs(backend: str) -> None:
    """A bound that holds for any one layer: half a step of each input and weight, times what it is multiplied with."""
    torch.manual_seed(2)
    linear = nn.Linear(20, 6)
    net = nn.Sequential(nn.Flatten(), linear).eval()
    images = torch.rand(32, 5, 2, 2)
    logits = quantize(net, [images], backend=backend)(images)
    weight = linear.weight.abs()
    input_step, weight_step = images.max() / 255, weight.amax(1) / 127
    x = images.flatten(1)
    bound = 0.5 * input_step * weight.sum(1) + 0.5 * weight_step * x.sum(1, keepdim=True)
    bound = bound + 20 * 0.25 * input_step * weight_step + input_step * weight_step  # of both, and of the bias
    error = (logits - net(images)).abs()
    if backend == "torch" or not sums_saturate():
        assert (error <= 1.001 * bound).all()
    assert error.max() > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_network_and_the_random_generators_stay_as_they_are(
    backend: str, images: Tensor, quantized: dict[str, Int8Network]
) -> None:
    net = to_deploy(randomize(tiny(num_classes=10), 3)).double().requires_grad_(True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    made = quantize(net, images.split(24), backend=backend)
    made(images)
    noise(net, made, images[:4])
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1][1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.dtype == torch.float64 and p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_images_give_the_same_bits_in_any_batches(
    backend: str, net: nn.Module, images: Tensor, quantized: dict[str, Int8Network]
) -> None:
    again = quantize(net, [images[:40].flip(0), images[40:]], backend=backend)
    assert torch.equal(again(images), quantized[backend](images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_batch_dtype_and_autocast(backend: str, images: Tensor, quantized: dict[str, Int8Network]) -> None:
    made = quantized[backend]
    whole = made(images)
    assert (whole.shape, whole.dtype, whole.requires_grad) == ((48, 10), torch.float32, False)
    assert torch.allclose(torch.cat([made(images[:1]), made(images[1:])]), whole, atol=1e-5)
    assert torch.equal(made(images.double()), whole)
    assert torch.equal(made(images.to(memory_format=torch.channels_last)), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(images), whole)
    holder = nn.ModuleDict({"int8": made}).to(torch.bfloat16)  # as Lightning casts what it is given
    assert torch.equal(holder["int8"](images), whole)
    assert not made.state_dict()
    assert not list(made.parameters())


@pytest.mark.parametrize(
    ("backend", "method"),
    [pytest.param(b, m, marks=pytest.mark.slow if b == "onnxruntime" else ()) for b in BACKENDS for m in METHODS[b]],
)
def test_every_method_quantizes(backend: str, method: str, net: nn.Module, images: Tensor) -> None:
    made = quantize(net, images.split(24), backend=backend, method=method)
    exact = net(images).detach()
    assert (made(images) - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize(
    ("backend", "method"),
    [("torch", "histogram"), pytest.param("onnxruntime", "percentile", marks=pytest.mark.slow)],
)
def test_clipping_methods_clip_an_outlier_and_minmax_does_not(
    backend: str, method: str, net: nn.Module, images: Tensor
) -> None:
    """One pixel a hundred times as large takes most steps of minmax."""
    spoiled = images.clone()
    spoiled[0, 0, 0, 0] = 300
    ordinary = images[1:]
    exact = net(ordinary).detach()
    errors = [
        float((quantize(net, [spoiled], backend=backend, method=chosen)(ordinary) - exact).norm())
        for chosen in ("minmax", method)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("options", [{"squeeze_excite": True}, {"groups": 2}], ids=["se", "groups"])
@pytest.mark.parametrize("backend", MOSTLY_TORCH)
def test_other_variants(backend: str, options: dict, images: Tensor) -> None:
    torch.manual_seed(0)
    net = to_deploy(randomize(tiny(num_classes=10, **options)))
    made = quantize(net, [images], backend=backend)
    exact = net(images).detach()
    assert (made(images) - exact).norm() / exact.norm() < 0.05
    assert [layer.name for layer in noise(net, made, images[:8])] == list(weights(net))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_signal_over_difference(
    backend: str, net: nn.Module, images: Tensor, quantized: dict[str, Int8Network]
) -> None:
    found = {layer.name: layer for layer in noise(net, quantized[backend], images)}
    stem = net.stem.conv.weight.detach()  # type: ignore[union-attr]
    difference = stem.double().numpy() - rounded(stem)
    expected = 10 * np.log10((stem.double().numpy() ** 2).sum() / (difference**2).sum())
    assert found["stem.conv"].weight_db == pytest.approx(expected, abs=0.01)
    largest = stem.abs().amax((1, 2, 3))
    assert found["stem.conv"].channel_range == pytest.approx(float(largest.max() / largest.median()))
    # the head's output is the logits
    exact, made = net(images).detach(), quantized[backend](images)
    assert found["head"].output_db == pytest.approx(-20 * float(((exact - made).norm() / exact.norm()).log10()), abs=1)


def test_a_layer_whose_channels_are_far_apart_stands_out(images: Tensor) -> None:
    """What int8 suffers from by one scale for the tensor; one for each channel is the cure."""
    torch.manual_seed(0)
    net = to_deploy(randomize(tiny(num_classes=10)))
    with torch.no_grad():
        net.stages[1][0].conv.weight[0] *= 1000  # type: ignore[index,union-attr]
    exact = net(images).detach()

    def measured(per_channel: bool) -> tuple[LayerNoise, float]:
        made = quantize(net, [images], backend="torch", per_channel=per_channel)
        layer = next(layer for layer in noise(net, made, images) if layer.name == "stages.1.0.conv")
        return layer, float((made(images) - exact).norm() / exact.norm())

    (apart, error), (together, error_of_one_scale) = measured(True), measured(False)
    assert apart.channel_range == together.channel_range > 50
    assert apart.weight_db > together.weight_db + 5
    assert error < 0.5 * error_of_one_scale


def test_an_onnx_file_is_quantized_with_its_metadata(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    export_onnx(net, source, input_size=(3, 32, 32), metadata={"classes": "ten"})
    quantize_onnx(source, target, images.split(16), metadata={"int8": "minmax of 48 images"})
    program = load_program(target)
    assert program.metadata.items() >= {"classes": "ten", "int8": "minmax of 48 images"}.items()
    assert torch.equal(program(images), quantize(net, images.split(16), backend="onnxruntime")(images))
    assert target.stat().st_size < 0.5 * source.stat().st_size
    first = target.read_bytes()
    quantize_onnx(source, target, images.split(16), metadata={"int8": "minmax of 48 images"})
    assert target.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.onnx", "int8.onnx"]
    onnx.checker.check_model(onnx.load(target), full_check=True)


@pytest.mark.slow
def test_raw_pixels_go_through_a_file_that_normalises_them(net: nn.Module, tmp_path: Path) -> None:
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    pixels = torch.randint(0, 256, (32, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    export_onnx(net, source, input_size=(3, 32, 32), mean=[100.0] * 3, std=[60.0] * 3)
    quantize_onnx(source, target, [pixels])
    exact = net((pixels - 100) / 60).detach()
    assert (load_program(target)(pixels) - exact).norm() / exact.norm() < 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch.compile's
def test_a_compiled_graph_computes_the_same(net: nn.Module, images: Tensor, quantized: dict[str, Int8Network]) -> None:
    made = quantize(net, images.split(16), backend="torch", compiled=True)
    reference = quantized["torch"](images)
    exact = net(images).detach()
    logits = made(images)
    if not (sums_saturate() or LIMITED):  # which is more than rounding
        assert (logits - reference).norm() < 0.5 * (reference - exact).norm()
    with pytest.raises(ValueError, match="compiled=True is torch's"):
        quantize(net, [images], backend="onnxruntime", compiled=True)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tensorrt",), "int8=tensorrt: choose onnxruntime or torch, or null"),
        (("torch", "entropy"), "method=entropy: int8=torch knows minmax, histogram"),
        (("onnxruntime", "histogram"), "method=histogram: int8=onnxruntime knows minmax, entropy, percentile"),
    ],
)
def test_a_wrong_choice_names_the_choices(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_int8(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_package_is_named_with_the_command(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_options, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"int8={backend} needs .*pip install -e '\.\[deploy\]'"):
        require_int8(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images_are_an_error(backend: str, net: nn.Module) -> None:
    with pytest.raises(ValueError, match="needs images to calibrate"):
        quantize(net, [], backend=backend)


@pytest.mark.slow
def test_a_cpu_whose_sums_saturate_is_named(
    net: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(int8.platform, "machine", lambda: "x86_64")
    with caplog.at_level(logging.WARNING):
        quantize(net, [images[:2]], backend="onnxruntime")
        quantize(net, [images[:2]], backend="torch", compiled=True)
        quantize(net, [images[:2]], backend="torch")
    assert [record.message.partition(" may")[0] for record in caplog.records if "VNNI" in record.message] == [
        f"this CPU has no VNNI: int8 sums of {what}" for what in ("onnxruntime", "compiled torch")
    ]
    for unit in ("avx512_vnni", "avx_vnni"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda unit=unit: {"avx2": True, unit: True})
        assert not sums_saturate()


def test_the_libraries_say_nothing(
    net: nn.Module,
    images: Tensor,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "sums_saturate", lambda: False)  # what we say ourselves of such a processor
    with caplog.at_level(logging.INFO):
        for backend in BACKENDS:
            quantize(net, [images[:2]], backend=backend, method=METHODS[backend][-1])
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
