"""Which keys of the config can change a result: one table, with a reason per row.

The run's identity, the report and the commands that read a checkpoint go by it. A key without a row can change a
result: another value is another run, in another folder, and in another group of the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """What a key can change.

    ======== ===================== ================================ ===============
    kind     names a run's folder  may differ in a continued run    splits groups
    ======== ===================== ================================ ===============
    NOTHING  no                    yes                              no
    PLACE    yes                   yes                              no
    FILES    yes                   yes                              unless the repository writes these files itself
    MACHINE  yes                   yes                              yes
    LABEL    yes                   no                               no
    (no row) yes                   no                               yes
    ======== ===================== ================================ ===============
    """

    NOTHING = "no number at all"
    PLACE = "where something is, or what is looked at beside the result"
    FILES = "which images, if another file is there"
    MACHINE = "speeds, and the rounding of results"
    LABEL = "nothing by itself: it says which run this is"


@dataclass(frozen=True)
class Row:
    """A key, with all that is under it; of two rows the longer key counts."""

    key: str
    kind: Kind
    why: str


ROWS = (
    Row("logger", Kind.NOTHING, "where numbers are sent"),
    Row("run", Kind.NOTHING, "names and tags of the run for W&B and its folder"),
    Row("required", Kind.NOTHING, "which keys must be given; those have rows of their own"),
    Row("recompute", Kind.NOTHING, "the same bits, in less memory and more time"),
    Row("ddp_timeout_s", Kind.NOTHING, "how long a process waits before it gives up"),
    Row("data.num_threads", Kind.NOTHING, "crops and flips are the same for any number of threads"),
    Row("data.batches_ahead", Kind.NOTHING, "how early batches are decoded"),
    Row("data.os_cache", Kind.NOTHING, "through which cache files are read"),
    Row("data.check", Kind.NOTHING, "how much of a file is read over before a training"),
    Row("data.write_command", Kind.NOTHING, "what an error suggests"),
    Row("callbacks.interruption", Kind.NOTHING, "when checkpoints are written to go on from"),
    Row("callbacks.perf", Kind.NOTHING, "watches the loader and warns"),
    Row("trainer.max_time", Kind.NOTHING, "a training that it cuts short is not finished, and goes on"),
    Row("trainer.enable_progress_bar", Kind.NOTHING, "what the terminal shows"),
    Row("trainer.enable_model_summary", Kind.NOTHING, "what the terminal shows"),
    Row("root", Kind.PLACE, "where outputs and embedded data go"),
    Row("output_dir", Kind.PLACE, "the run's folder"),
    Row("trainer.default_root_dir", Kind.PLACE, "the run's folder"),
    Row("callbacks.checkpoints.directory", Kind.PLACE, "in the run's folder"),
    Row("callbacks.guard.directory", Kind.PLACE, "the run's folder"),
    Row("callbacks.health", Kind.PLACE, "looks at branches and gradients, and changes none"),
    Row("trainer.log_every_n_steps", Kind.PLACE, "how many rows the history has"),
    Row("trainer.profiler", Kind.PLACE, "measures the time of the parts of a step"),
    Row("bench.every_n_epochs", Kind.PLACE, "how often the speed is measured"),
    Row("callbacks.two_forms.throughput.every_n_epochs", Kind.PLACE, "repeats bench.every_n_epochs"),
    Row("bench.device", Kind.PLACE, "repeats device"),
    Row("data.prepare.directory", Kind.PLACE, "where the repository writes embedded data"),
    Row("choices.logger", Kind.PLACE, "the option's values have rows"),
    Row("choices.trainer", Kind.PLACE, "the option's values have rows, or count"),
    Row("choices.data", Kind.PLACE, "the option's values have rows, or count"),
    Row("git", Kind.PLACE, "most commits change no number; both the report and a continued run name them"),
    Row("data.dir", Kind.FILES, "the folder of the data files"),
    Row("data.train_file", Kind.FILES, "a file of the data"),
    Row("data.val_file", Kind.FILES, "a file of the data"),
    Row("quantizer.file", Kind.FILES, "repeats data.train_file unless it is set"),
    Row("callbacks.int8.quantizer.file", Kind.FILES, "repeats quantizer.file"),
    Row("trainer.accelerator", Kind.MACHINE, "what computes"),
    Row("trainer.devices", Kind.MACHINE, "how many compute; the batch is shared among them"),
    Row("trainer.num_nodes", Kind.MACHINE, "how many machines"),
    Row("trainer.strategy", Kind.MACHINE, "how devices exchange gradients"),
    Row("trainer.benchmark", Kind.MACHINE, "cuDNN takes the algorithm that is fastest"),
    Row("device", Kind.MACHINE, "what computes"),
    Row("threads", Kind.MACHINE, "of the processor"),
    Row("world_size", Kind.MACHINE, "how many processes trained"),
    Row("versions", Kind.MACHINE, "of torch and Lightning"),
    Row("bench", Kind.MACHINE, "how the speed of both forms is measured"),
    Row("callbacks.two_forms.throughput", Kind.MACHINE, "repeats bench"),
    Row("seed", Kind.LABEL, "groups are of several seeds"),
    Row("experiment", Kind.LABEL, "a table or figure; what it sets stands under its own keys"),
)
#: Keys of train.yaml that a command with a checkpoint does not read, by command, with the reason.
UNREAD = {
    "evaluate": {
        "recipe": "how a network is trained",
        "callbacks": "of a training",
        "module": "what is trained, with its optimizer",
        "bench": "benchmark.py inference measures the speed of a checkpoint",
        "init_from": "ckpt= names the weights",
        "ckpt_path": "ckpt= names the weights",
        "required": "of a recipe",
        "seed": "nothing is random here",
        "recompute": "of a backward pass",
        "batchnorm": "of a training with several processes",
        "data.train_transform": "validation images alone are read",
    },
}
UNREAD["export"] = {
    **UNREAD["evaluate"],
    "trainer": "a file is written, nothing is run by Lightning",
    "logger": "nothing is logged",
    "run": "nothing is logged",
    "compile": "the runtime that runs the file compiles it",
    "channels_last": "a file says nothing of the memory format",
    "tf32": "the file is compared in float32 on the processor",
    "ddp_timeout_s": "there is one process",
}


def kind_of(key: str) -> Kind | None:
    """The kind of a dotted key by the longest row that it is under; None: it can change a result."""
    fitting = [row for row in ROWS if is_under(key, row.key)]
    return max(fitting, key=lambda row: len(row.key)).kind if fitting else None


def names_a_folder(key: str) -> bool:
    """Whether another value of a key means another run, in another folder."""
    return kind_of(key) is not Kind.NOTHING


def may_differ(key: str) -> bool:
    """Whether a run may be continued with another value of a key."""
    return kind_of(key) not in (None, Kind.LABEL)


def splits_groups(key: str, *, own_files: bool) -> bool:
    """Whether runs with different values of a key stand in different groups of the report.

    ``own_files``: the repository writes the data files itself, so that they are the same wherever they lie.
    """
    kind = kind_of(key)
    return kind in (None, Kind.MACHINE) or (kind is Kind.FILES and not own_files)


def is_under(key: str, node: str) -> bool:
    """Whether a dotted key is a node, or under it."""
    return key == node or key.startswith(f"{node}.")


def flat(config: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; an empty node is a value."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{parent}{name}.")
        else:
            yield f"{parent}{name}", value


#: Where Lightning takes a whole number for batches and a float for a share: 1 is one batch, 1.0 all of them.
BATCHES_OR_SHARE = tuple(
    f"trainer.{name}"
    for name in ("overfit_batches", "val_check_interval", *(f"limit_{of}_batches" for of in ("train", "val", "test")))
)


def comparable(key: str, value: object) -> object:
    """A value of a flat config to compare: elsewhere than in `BATCHES_OR_SHARE` 1 and 1.0 are one number."""
    if key in BATCHES_OR_SHARE and isinstance(value, float):
        return f"{value:g} of all"
    return float(value) if type(value) is int and key not in BATCHES_OR_SHARE else value
