"""A training that goes on from another's checkpoint: its state, and the hyper-parameters of the one that goes on."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from repvgg.learn.checkpoint import POSITION, RUN, Checkpoints, require_continuable
from repvgg.learn.ema import EMA
from repvgg.learn.module import Classifier
from repvgg.learn.run import train_and_test
from support.commands import heavy
from support.equal import checkpoint, different
from support.training import classifier, datamodule, trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What Lightning says where the checkpoint has more callbacks, or fewer.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging"),
]
EPOCHS, STEPS, WARMUP, LR = 4, 5, 1, 0.1
CHOICES = {"model": "repvgg_b0", "ablation": "full"}


class Record(pl.Callback):
    """What the optimiser is about to do at every step, and the records of the images that it has seen for it."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.groups: list[dict[str, Any]] = []
        self.momenta: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.images: list[list[int]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        group = optimizer.param_groups[0]
        self.rates.append(group["lr"])
        self.groups.append({name: value for name, value in group.items() if name != "params"})
        if not self.momenta:
            buffers = [optimizer.state[p].get("momentum_buffer") for p in group["params"]]
            self.momenta = [buffer.clone() for buffer in buffers if buffer is not None]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        records = trainer.train_dataloader.batch_records(trainer.current_epoch, batch_idx)
        self.images.append(sorted(map(int, records)))


def train(
    directory: Path,
    digits: Path,
    *extra: pl.Callback,
    module: Classifier | None = None,
    ckpt_path: Path | None = None,
    batch: int = 64,
    **options: Any,
) -> Record:
    record, keeper = Record(), Checkpoints(str(directory / "checkpoints"), monitor="val/top1")
    options = {"max_epochs": EPOCHS, "limit_train_batches": STEPS, "enable_checkpointing": True, **options}
    run = trainer(directory, [EMA(0.9), record, *extra, keeper], **options)
    module = module or classifier(warmup_epochs=WARMUP, lr=LR)
    data = datamodule(digits, mixup=0.2, batch_size=batch)
    train_and_test(run, module, data, ckpt_path, choices=CHOICES, hyper_parameters={"recipe.lr": 0.1})
    return record


def cosine(step: int, epochs: int = EPOCHS, steps: int = STEPS, lr: float = LR) -> float:
    """The schedule, by hand."""
    warmup = WARMUP * steps
    if step < warmup:
        return lr * (0.01 + 0.99 * step / warmup)
    return lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (epochs * steps - warmup)))


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """Four epochs, with the checkpoints that Lightning's own callbacks write in between."""
    directory = tmp_path_factory.mktemp("whole")
    every = {"save_top_k": -1, "save_weights_only": False}
    epochs = ModelCheckpoint(directory / "epochs", "{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, **every)
    validations = ModelCheckpoint(
        directory / "validations", "{epoch}", every_n_epochs=2, save_on_train_epoch_end=False, **every
    )
    steps = ModelCheckpoint(directory / "steps", "{step}", every_n_train_steps=1, **every)
    record = train(directory, digits, epochs, validations, steps)
    return directory, record


@pytest.fixture(scope="module")
def two(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was meant to have two epochs."""
    directory = tmp_path_factory.mktemp("two")
    train(directory, digits, max_epochs=2)
    return directory / "checkpoints" / "last.ckpt"


# --- every checkpoint, whoever asked for it ---


@pytest.mark.parametrize(
    "name",
    [
        *("epochs/epoch=0.ckpt", "steps/step=7.ckpt", "steps/step=20.ckpt"),
        *(heavy(f"epochs/epoch={n}.ckpt") for n in (1, 2)),
        *(heavy(f"validations/epoch={n}.ckpt") for n in (1, 3)),
        *(heavy(f"steps/step={n}.ckpt") for n in (1, 5, 10, 19)),
    ],
)
def test_any_checkpoint_goes_on_to_the_very_same_end(
    name: str, whole: tuple[Path, Record], digits: Path, tmp_path: Path
) -> None:
    directory, record = whole
    record_of_rest = train(tmp_path, digits, ckpt_path=directory / name)
    done = len(record.losses) - len(record_of_rest.losses)
    assert record.images[done:] == record_of_rest.images  # nothing twice, nothing left out
    assert all(map(torch.equal, record.losses[done:], record_of_rest.losses))
    expected, found = checkpoint(directory), checkpoint(tmp_path)
    for content in (expected, found):  # whose files they are, and of which there are fewer callbacks here
        for key in ("callbacks", RUN):
            del content[key]
    assert different(expected, found) == []


class SavesAt(pl.Callback):
    """Asks for a checkpoint at a hook, the n-th time that it is called."""

    def __init__(self, hook: str, call: int, path: Path) -> None:
        def save(trainer: pl.Trainer, *_: object, **__: object) -> None:
            nonlocal call
            call -= 1
            if call == 0:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_validation_batch_end", 2),
        heavy("on_train_batch_end", 5),
        *(heavy(hook, 1) for hook in ("on_fit_start", "on_train_start", "on_validation_end")),
        *(heavy(hook, 2) for hook in ("on_train_epoch_start", "on_validation_start", "on_train_epoch_end")),
        heavy("on_train_batch_start", 7),
    ],
)
def test_a_checkpoint_of_any_hook_goes_on_to_the_very_same_end(
    hook: str, call: int, whole: tuple[Path, Record], digits: Path, tmp_path: Path
) -> None:
    directory, record = whole
    file = tmp_path / "mine.ckpt"
    saves = SavesAt(hook, call, file)
    train(tmp_path / "first", digits, saves)
    rest = train(tmp_path / "rest", digits, ckpt_path=file)
    assert record.images[len(record.images) - len(rest.images) :] == rest.images
    expected, found = checkpoint(directory), checkpoint(tmp_path / "rest")
    for key in (
        "state_dict",
        "current_model_state",
        "optimizer_states",
        "lr_schedulers",
        "loops",
        "global_step",
        POSITION,
    ):
        assert different(expected[key], found[key]) == [], key


def test_a_checkpoint_between_two_accumulated_batches_goes_on_with_the_whole_step(digits: Path, tmp_path: Path) -> None:
    """Its images are those of the step; nothing else is known to be right, since the statistics have moved on."""
    file = tmp_path / "mine.ckpt"
    options: dict[str, Any] = {"batch": 32, "accumulate_grad_batches": 2, "limit_train_batches": 10, "max_epochs": 1}
    options["module"] = classifier(batch_size=64)
    first = train(tmp_path / "first", digits, SavesAt("on_train_batch_end", 5, file), **options)
    assert torch.load(file, weights_only=True)[POSITION] == {"name": "batches", "epoch": 0, "batches": 4, "images": 128}
    rest = train(tmp_path / "rest", digits, ckpt_path=file, **options)
    assert rest.images == first.images[4:]


# --- the hyper-parameters ---


def test_two_epochs_and_two_more_follow_the_schedule_of_four(
    whole: tuple[Path, Record], two: Path, digits: Path, tmp_path: Path
) -> None:
    rest = train(tmp_path, digits, ckpt_path=two)
    assert rest.rates == whole[1].rates[2 * STEPS :]  # to the bit
    assert rest.rates == pytest.approx([cosine(step) for step in range(2 * STEPS, 4 * STEPS)], rel=1e-12)
    assert rest.images == whole[1].images[2 * STEPS :]
    saved = torch.load(two, weights_only=True)["optimizer_states"][0]
    kernels = saved["param_groups"][0]["params"]
    assert all(
        torch.equal(ours, saved["state"][i]["momentum_buffer"]) for ours, i in zip(rest.momenta, kernels, strict=True)
    )


def test_the_optimiser_has_the_options_that_were_given(two: Path, digits: Path, tmp_path: Path) -> None:
    module = classifier(warmup_epochs=WARMUP, lr=0.02, weight_decay=5e-3)
    module.make_optimizer = partial(torch.optim.SGD, momentum=0.8, nesterov=True)
    rest = train(tmp_path, digits, module=module, ckpt_path=two)
    for group in rest.groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.8, True, 5e-3)
        assert group["initial_lr"] == 0.02
    assert rest.rates == pytest.approx([cosine(step, lr=0.02) for step in range(2 * STEPS, 4 * STEPS)], rel=1e-12)
    # and so has the checkpoint that this run goes on from itself
    again = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert again["param_groups"][0]["weight_decay"] == 5e-3


def test_a_run_that_went_on_and_was_stopped_goes_on_as_if_it_had_not_been(
    two: Path, digits: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"batch": 32, "limit_train_batches": 10}
    file = tmp_path / "stopped.ckpt"

    def module() -> Classifier:
        return classifier(warmup_epochs=WARMUP, lr=0.02, batch_size=32, weight_decay=5e-3)

    whole = train(
        tmp_path / "a", digits, SavesAt("on_train_batch_start", 14, file), module=module(), ckpt_path=two, **options
    )
    rest = train(tmp_path / "b", digits, module=module(), ckpt_path=file, **options)
    assert rest.rates == whole.rates[13:]
    assert different(checkpoint(tmp_path / "a")["state_dict"], checkpoint(tmp_path / "b")["state_dict"]) == []


@pytest.mark.parametrize(("batch", "limit"), [heavy(32, 10), (80, 4)])
def test_another_batch_size_goes_on_with_the_next_images(
    batch: int, limit: int, whole: tuple[Path, Record], digits: Path, tmp_path: Path
) -> None:
    """From the end of the first epoch, and from within the second."""
    directory, record = whole
    for name, images in (("epochs/epoch=0.ckpt", 0), ("steps/step=10.ckpt", 320), ("steps/step=8.ckpt", 192)):
        if images % batch:
            continue
        module = classifier(warmup_epochs=WARMUP, lr=LR, lr_batch=batch, batch_size=batch)
        options: dict[str, Any] = {"limit_train_batches": limit, "module": module, "batch": batch}
        rest = train(tmp_path / name, digits, ckpt_path=directory / name, **options)
        done = limit + images // batch  # steps of this size
        expected = [cosine(step, steps=limit) for step in range(done, EPOCHS * limit)]
        assert rest.rates == pytest.approx(expected, rel=1e-12)
        seen = [image for images_of_batch in record.images[STEPS : STEPS + images // 64] for image in images_of_batch]
        second_epoch = [
            image for images_of_batch in rest.images[: limit - images // batch] for image in images_of_batch
        ]
        assert not set(seen) & set(second_epoch)
        assert len(seen) + len(second_epoch) == STEPS * 64


def test_averaged_weights_begin_or_end_with_the_command(two: Path, digits: Path, tmp_path: Path) -> None:
    """Without an average the weights of the last step go on, not their average."""
    module = classifier(lr=LR)
    keeper = Checkpoints(str(tmp_path / "checkpoints"), monitor="val/top1")
    first: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            first.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    run = trainer(tmp_path, [Look(), keeper], max_epochs=3, enable_checkpointing=True)
    train_and_test(run, module, datamodule(digits), two, choices=CHOICES, hyper_parameters={"recipe.lr": 0.1})
    assert different(first, torch.load(two, weights_only=True)["current_model_state"]) == []


# --- what cannot be carried over ---


def refusal(path: Path, module: Classifier | None = None, *, batch_size: int = 64, epochs: int = EPOCHS) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the caller looks at it
        require_continuable(path, CHOICES, module or classifier(), batch_size=batch_size, epochs=epochs)
    return str(refused.value)


def test_what_fits_is_continued(two: Path) -> None:
    theirs = require_continuable(two, CHOICES, classifier(), batch_size=64, epochs=EPOCHS)
    assert theirs == {"recipe.lr": 0.1}


def test_an_epoch_limit_that_is_passed_is_refused(two: Path) -> None:
    said = refusal(two, epochs=2)
    assert "is of a training of 2 epochs, which trainer.max_epochs=2 ends before" in said
    assert f"init_from={two} begins anew" in said


def test_a_batch_size_that_leaves_no_whole_step_is_refused(whole: tuple[Path, Record]) -> None:
    file = whole[0] / "steps" / "step=8.ckpt"
    said = refusal(file, batch_size=80)
    assert "recipe.batch_size=80: the checkpoint lies after 192 images of an epoch" in said
    assert "recipe.batch_size=64 or 96" in said
    assert "init_from=" in said


@pytest.mark.parametrize("options", [{"decay_identity_gamma": True}, {"bias_lr_factor": 2.0}, {"custom_l2": True}])
def test_other_parameter_groups_are_refused(options: dict[str, Any], two: Path) -> None:
    said = refusal(two, classifier(**options))
    assert "has the parameter groups kernels, rest, not" in said
    assert "init_from=" in said


def test_another_optimiser_is_refused_and_a_new_momentum_is_not(digits: Path, two: Path, tmp_path: Path) -> None:
    adam = classifier()
    adam.make_optimizer = torch.optim.AdamW
    assert "has momentum_buffer of its optimiser, and AdamW needs exp_avg, exp_avg_sq, step too" in refusal(two, adam)
    none = classifier(warmup_epochs=WARMUP)
    none.make_optimizer = torch.optim.SGD
    train(tmp_path, digits, module=none, max_epochs=2)
    require_continuable(tmp_path / "checkpoints" / "last.ckpt", CHOICES, classifier(), batch_size=64, epochs=EPOCHS)


def test_a_checkpoint_that_does_not_say_what_it_was_trained_with_is_refused(two: Path, tmp_path: Path) -> None:
    content = torch.load(two, weights_only=True)
    del content[RUN]["hyper_parameters"]
    torch.save(content, tmp_path / "old.ckpt")
    assert "does not say what it was trained with: init_from=" in refusal(tmp_path / "old.ckpt")


def test_max_steps_that_end_within_an_epoch_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_steps=7 ends within an epoch of 5 steps.* give trainer.max_steps=5, or"):
        train(tmp_path, digits, max_steps=7, max_epochs=-1)
