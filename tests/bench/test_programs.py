"""What a turn does: the right network, in the right form, precision, layout and context, and a step that trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repvgg.bench import memory, programs
from repvgg.bench.lines import Line, Setting
from repvgg.bench.memory import NotMeasuredError, peak
from repvgg.bench.programs import Conditions, Conversion, Inference, Training, Work, slice_inputs, write_file
from repvgg.bench.rounds import Program
from repvgg.bench.sides import Side
from repvgg.deploy.int8 import sums_saturate
from repvgg.model import FusedBlock, equivalence, memory_format_of, to_deploy
from support import peer
from support.networks import randomize, tiny

SMALL = Conditions(batch=2, resolution=32, threads=1, device="cpu")


def made(model: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(tiny())


OURS = Side("ours", made, to_deploy)
THEIRS = Side("theirs", peer.small, peer.deploy)


def line(form: str = "", precision: str = "float32", runtime: str = "eager", layout: str = "channels_last") -> Line:
    return Line("repvgg_a0", "ours", Setting(form, precision, runtime, layout))


def logits(work: Work) -> Tensor:
    result = work.prepare().call()
    assert isinstance(result, Tensor)
    return result.float()


def test_both_forms_compute_the_network_in_every_layout_and_precision() -> None:
    expected = made("").eval()(SMALL.images()).detach()
    for form in ("train_form", "deploy"):
        for layout in ("channels_last", "contiguous"):
            got = logits(Inference(line(form, layout=layout), OURS, SMALL))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    half = logits(Inference(line("deploy", "bfloat16"), OURS, SMALL))
    assert 0 < (half - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_forward_runs_in_the_layout_and_form_asked_for(layout: torch.memory_format, monkeypatch) -> None:
    seen = []

    def deploy(net: nn.Module) -> nn.Module:
        deployed = to_deploy(net)
        deployed.register_forward_hook(lambda module, images, _: seen.append((module, images[0])))
        return deployed

    name = "channels_last" if layout == torch.channels_last else "contiguous"
    work = Inference(line("deploy", "bfloat16", layout=name), replace(OURS, deploy=deploy), SMALL)
    work.prepare().call()
    ((net, images),) = seen
    assert not net.training
    assert any(isinstance(module, FusedBlock) for module in net.modules())
    assert memory_format_of(net) == layout
    assert images.is_contiguous(memory_format=layout)
    assert images.dtype == torch.bfloat16


def test_a_file_is_written_once_and_run(tmp_path: Path) -> None:
    expected = made("").eval()(SMALL.images()).detach()
    of_file = line("deploy", runtime="onnxruntime", layout="its own")
    work = write_file(Inference(of_file, OURS, SMALL), tmp_path)
    (file,) = tmp_path.iterdir()
    assert work.file == file
    torch.testing.assert_close(logits(work), expected, rtol=1e-4, atol=1e-4)
    written = file.stat().st_mtime_ns
    quantized = write_file(Inference(line("deploy", "int8", "onnxruntime", "its own"), OURS, SMALL), tmp_path)
    assert file.stat().st_mtime_ns == written
    assert quantized.file != file
    distance = (logits(quantized) - expected).norm() / expected.norm()
    assert 0 < distance < (math.inf if sums_saturate() else 0.2)


def test_a_step_trains_as_sgd_does() -> None:
    """Three steps beside plain torch's: SGD with momentum, and decay of kernels alone."""
    nets = []

    def build(model: str) -> nn.Module:
        nets.append(made(model))
        return nets[-1]

    conditions = replace(SMALL, batch=4, resolution=64)
    program = Training(line(), Side("ours", build, None), conditions).prepare()
    reference = made("").train()
    kernels, others = ([p for p in reference.parameters() if (p.ndim > 1) is is_kernel] for is_kernel in (True, False))
    groups = [{"params": kernels, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1 * 4 / 256, momentum=0.9)
    for _ in range(3):
        loss = nn.functional.cross_entropy(reference(conditions.images()), torch.arange(4))
        assert float(program.call()) == pytest.approx(loss.item(), rel=1e-3)  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, expected in zip(nets[0].parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is not None for parameter in nets[0].parameters())
    program.rest()
    assert all(parameter.grad is None for parameter in nets[0].parameters())


def test_bfloat16_trains_by_autocast() -> None:
    seen = []

    def build(model: str) -> nn.Module:
        net = made(model)
        conv = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
        conv.register_forward_hook(lambda module, inputs, output: seen.append((module.weight.dtype, output.dtype)))
        return net

    Training(line(precision="bfloat16"), Side("ours", build, None), SMALL).prepare().call()
    assert seen == [(torch.float32, torch.bfloat16)]


def test_a_side_is_built_and_run_in_its_context() -> None:
    inside = []
    depth = 0

    @contextmanager
    def context() -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    def build(model: str) -> nn.Module:
        inside.append(depth)
        net = made(model)
        net.register_forward_hook(lambda *_: inside.append(depth))
        return net

    side = Side("ours", build, None, context=context)
    for work in (Training(line(), side, SMALL), Inference(line("train_form"), side, SMALL)):
        work.prepare().call()
    assert inside == [1, 1, 1, 1]
    assert depth == 0


def test_sliced_inputs_are_the_same_map_and_gradient() -> None:
    net = randomize(peer.small("repvgg_a0")).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def outcome() -> list[Tensor]:
        net.zero_grad()
        logits = net.train()(images)
        logits.square().sum().backward()
        return [logits, *(p.grad for p in net.parameters() if p.grad is not None)]

    before = [tensor.clone() for tensor in outcome()]
    assert slice_inputs(net) == 3  # 3 → 8, and twice from 8 channels; those from 16 and more stay as they are
    for a, b in zip(before, outcome(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert slice_inputs(net) == 0


@pytest.mark.parametrize(
    ("runtime", "layout", "device", "needed"),
    [
        ("eager", "channels_last", "cpu", True),
        ("compile", "contiguous", "cpu", True),
        ("eager", "contiguous", "cpu", False),
        ("compile", "channels_last", "cuda", False),
    ],
)
def test_others_are_kept_from_torchs_crash_only_where_it_is(runtime, layout, device, needed) -> None:
    assert programs.needs_sliced_inputs(runtime, layout, device) is needed


def test_a_conversion_makes_a_new_network() -> None:
    work = Conversion(Line("repvgg_a0", "theirs", Setting()), THEIRS, SMALL)
    assert work.images_per_call == 0
    program = work.prepare()
    first, second = program.call(), program.call()
    assert isinstance(first, nn.Module)
    assert isinstance(second, nn.Module)
    assert first is not second
    assert equivalence(first, second, SMALL.images()).max_abs == 0


def test_a_wrong_conversion_is_not_measured() -> None:
    for work in (
        Conversion(line(), replace(THEIRS, deploy=peer.wrong), SMALL),
        Inference(line("deploy"), replace(THEIRS, deploy=peer.wrong), SMALL),
    ):
        with pytest.raises(ValueError, match="another function"):
            work.prepare()


def test_torchs_generator_stays_where_it_is() -> None:
    before = torch.get_rng_state()
    SMALL.images()
    programs.calibration(SMALL)
    assert torch.equal(before, torch.get_rng_state())


# --- memory -----------------------------------------------------------------------------------------------------------

MIB = 2**20


class Allocating(Work):
    """Holds 128 MiB at rest, and 64 MiB more while it runs."""

    def prepare(self) -> Program:
        held = torch.ones(32 * MIB)

        def call() -> float:
            return float(torch.ones(16 * MIB).sum() + held[0])

        return Program(call)


class Dying(Work):
    def prepare(self) -> Program:
        import os

        os._exit(9)


class Failing(Work):
    def prepare(self) -> Program:
        raise RuntimeError("no such thing")


def test_the_peak_is_what_a_call_needs_above_what_is_held() -> None:
    assert peak(Allocating(line(), OURS, SMALL)) == pytest.approx(64 * MIB, rel=0.1)


@pytest.mark.parametrize(("work", "says"), [(Dying, "exit code 9, perhaps out of memory"), (Failing, "no such thing")])
def test_memory_that_cannot_be_measured_says_why(work: type[Work], says: str) -> None:
    with pytest.raises(NotMeasuredError, match=says):
        peak(work(line(), OURS, SMALL))


def test_a_step_at_rest_has_no_gradients_left() -> None:
    nets = []

    def build(model: str) -> nn.Module:
        nets.append(made(model))
        return nets[-1]

    memory._at_rest(Training(line(), Side("ours", build, None), SMALL))
    assert all(parameter.grad is None for parameter in nets[0].parameters())
