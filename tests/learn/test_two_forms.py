"""The callback that validates what will be deployed."""

import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from repvgg.learn.two_forms import Disagreement, FormsDisagreeError
from repvgg.model import Affine, Block, Branch, ConvBN, ConvShape, to_deploy
from support.networks import ABLATIONS, tiny
from support.training import classifier, datamodule, trainer, two_forms

VALIDATION_KEYS = {
    *(f"val/{form}{name}" for form in ("", "deploy/") for name in ("loss", "top1", "top5")),
    *(f"reparam/{name}" for name in ("max_abs_logit_diff", "rel_l2_diff", "top1_agreement", "convert_s")),
    *(f"bench/{name}" for name in ("train_form/images_per_s", "deploy/images_per_s", "speedup", "spread")),
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_logs_both_forms_under_the_names_of_the_design(ablation: str, digits: Path, tmp_path: Path) -> None:
    module = classifier(tiny(ablation, num_classes=10))
    run = trainer(tmp_path, [two_forms()])
    run.fit(module, datamodule=datamodule(digits))
    logged = run.callback_metrics
    assert logged.keys() >= VALIDATION_KEYS
    assert 0 < logged["reparam/rel_l2_diff"] < 1e-4
    assert logged["reparam/top1_agreement"] > 0.99
    assert logged["bench/speedup"] == pytest.approx(
        float(logged["bench/deploy/images_per_s"] / logged["bench/train_form/images_per_s"]), rel=1e-5
    )


def test_scores_of_both_forms_are_right(digits: Path, tmp_path: Path) -> None:
    """Against the plainest computation: all images in one batch, one form after the other, in float64."""
    module = classifier()
    run = trainer(tmp_path, [two_forms()])
    run.fit(module, datamodule=datamodule(digits))
    logged = dict(run.callback_metrics)
    data = datamodule(digits, batch_size=360)
    data.trainer = run
    images, labels = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert len(images) == 360
    for prefix, net in (("val", module.net), ("val/deploy", to_deploy(module.net))):
        with torch.no_grad():
            logits = copy.deepcopy(net).double().eval()(images.double())
        ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
        assert logged[f"{prefix}/top1"] == pytest.approx((ranks < 1).double().mean().item(), abs=1e-6)
        assert logged[f"{prefix}/top5"] == pytest.approx((ranks < 5).double().mean().item(), abs=1e-6)
        loss = nn.functional.cross_entropy(logits, labels)
        assert logged[f"{prefix}/loss"] == pytest.approx(loss.item(), rel=1e-4)


def weights(module: pl.LightningModule) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.net.state_dict().items()}  # type: ignore[union-attr]


def test_never_changes_training(digits: Path, tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [two_forms()]):
        module = classifier()
        pl.seed_everything(1, verbose=False)
        run = trainer(tmp_path, callbacks, max_epochs=2, val_check_interval=2)
        run.fit(module, datamodule=datamodule(digits))
        assert run.global_step == 10
        results.append((weights(module), torch.get_rng_state()))
    (without, rng_without), (with_callback, rng_with) = results
    assert all(torch.equal(without[k], with_callback[k]) for k in without)
    assert torch.equal(rng_without, rng_with)


class Liar(ConvBN):
    """Says of another map that it is this one."""

    def affine(self, dtype: torch.dtype, device: torch.device) -> Affine:
        honest = super().affine(dtype, device)
        return Affine(honest.kernel * 1.01, honest.bias)


def liar(precision: str, digits: Path, tmp_path: Path) -> None:
    net = tiny(num_classes=10)
    net.stages[2][1] = Block(ConvShape(32, 32), [Liar])
    run = trainer(tmp_path, [two_forms()], precision=precision)
    run.fit(classifier(net), datamodule=datamodule(digits))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_disagreement_fails_the_run_and_says_what_to_look_at(precision: str, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(FormsDisagreeError, match=r"relative in float32.*affine\(\)"):
        liar(precision, digits, tmp_path)


def test_bfloat16_is_checked_in_float32(digits: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, [two_forms()], precision="bf16-mixed")
    run.fit(classifier(), datamodule=datamodule(digits))
    # of its own precision, and far above what float32 shows: not an error
    assert run.callback_metrics["reparam/rel_l2_diff"] > 1e-4


@pytest.mark.slow
def test_a_compiled_network_is_validated_too(digits: Path, tmp_path: Path) -> None:
    module = classifier()
    module.net.compile(backend="eager")
    run = trainer(tmp_path, [two_forms()])
    run.fit(module, datamodule=datamodule(digits))
    assert run.callback_metrics["reparam/rel_l2_diff"] < 1e-4
    assert not any("_orig_mod" in key for key in module.state_dict())


def test_beside_logits_of_zero_nothing_is_no_difference() -> None:
    apart, zeros = Disagreement(), torch.zeros(4, 10)
    apart.update(zeros, zeros)
    assert apart.compute()["reparam/rel_l2_diff"] == 0
    apart.update(zeros, torch.ones(4, 10))
    assert not apart.compute()["reparam/rel_l2_diff"].isfinite()


def test_throughput_is_measured_when_due_and_never_with_zero(digits: Path, tmp_path: Path) -> None:
    from repvgg.learn.throughput import Throughput
    from repvgg.learn.two_forms import TwoFormValidation

    callback = TwoFormValidation(Throughput(resolution=32, batch=1, warmup=0, batches=1, every_n_epochs=0))
    run = trainer(tmp_path, [callback])
    run.fit(classifier(), datamodule=datamodule(digits))
    assert not any(key.startswith("bench/") for key in run.callback_metrics)
    due = Throughput(resolution=32, every_n_epochs=3)
    assert [due.is_due(epoch) for epoch in range(6)] == [False, False, True, False, False, True]
    with pytest.raises(ValueError, match=r"bench\.dtype=int8: choose one of float32"):
        Throughput(resolution=32, dtype="int8")


def test_a_branch_without_a_map_stops_at_the_first_validation(digits: Path, tmp_path: Path) -> None:
    class Curved(Branch):
        def __init__(self, shape: ConvShape) -> None:
            super().__init__()
            self.conv = ConvBN(shape)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu()

    net = tiny(num_classes=10)
    net.stages[0][0] = Block(ConvShape(8, 8, stride=2), [Curved])
    with pytest.raises(ValueError, match=r"layer 'stages\.0\.0\.branches\.0': Curved"):
        trainer(tmp_path, [two_forms()]).fit(classifier(net), datamodule=datamodule(digits))
