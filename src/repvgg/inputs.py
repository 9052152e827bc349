"""Which keys the commands read, and what each may be: a wrong value is answered before anything heavy is imported.

`TABLES` has a table for every command with a config in conf/. It has the shape of the composed config: a mapping for a
node, a `Rule` for a value. The keys of a node with a `_target_` are those that its target takes; of these the table has
what is known without importing it. Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repvgg.influence import flat


@dataclass(frozen=True)
class Rule:
    """What a value may be: in words, as in `seed=-1 must be a whole number of at least 0`, and as a test."""

    words: str
    holds: Callable[[Any], bool]
    verb: str = " must be"

    def __or__(self, other: Rule) -> Rule:
        words = f"{self.words.replace(' or ', ', ')} or {other.words}"
        return Rule(words, lambda value: self.holds(value) or other.holds(value), self.verb)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != float("inf")


def _range(low: float | None, high: float | None, above: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    parts = [("of at least", low), ("above", above), ("of at most", high)]
    return "".join(f" {words} {bound}" for words, bound in parts if bound is not None)


CHOOSE = ": choose"


def number(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Rule:
    """A finite number within bounds."""

    def holds(value: Any) -> bool:
        return (
            _is_number(value)
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
        )

    return Rule(f"a number{_range(low, high, above)}", holds)


def whole(low: int | None = None, high: int | None = None) -> Rule:
    """An integer within bounds; 63.0 is none."""
    in_range = number(low, high).holds
    return Rule(f"a whole number{_range(low, high, None)}", lambda value: isinstance(value, int) and in_range(value))


def choice(*names: str) -> Rule:
    """One of some words."""
    return Rule(" or ".join(filter(None, [", ".join(names[:-1]), names[-1]])), lambda value: value in names, CHOOSE)


def list_of(rule: Rule, length: int | None = None) -> Rule:
    """A list of as many values, each of which a rule holds for."""
    size = "" if length is None else f"{length} values, "
    return Rule(
        f"a list of {size}each {rule.words}",
        lambda value: isinstance(value, list) and len(value) == (length or len(value)) and all(map(rule.holds, value)),
    )


ANYTHING = Rule("anything", lambda _: True)
NULL = Rule("null", lambda value: value is None)
YES_NO = Rule("true or false", lambda value: isinstance(value, bool), CHOOSE)
#: What is typed as 123 is a number to Hydra, and a fine name.
TEXT = Rule("text", lambda value: isinstance(value, str | int | float) and not isinstance(value, bool))
TEXTS = list_of(TEXT)
SEED = whole(0, 2**32 - 1)  # numpy's
#: A node with a `_target_`, of which nothing is known here, or null.
MADE = Rule("null or a node with a _target_", lambda value: value is None or _has_target(value))
#: As MADE; its values repeat others by interpolation, and only those are logged.
MAPPING = Rule("a mapping", lambda value: isinstance(value, Mapping))
NODE = Rule("a node with keys of its own", MAPPING.holds)
REPEATED = Rule("a node of interpolations", MAPPING.holds)

#: Lightning's names, its aliases after them.
PRECISIONS = (
    *("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16", "32", "16", "bf16", "64"),
)


def _left_to(other: str) -> Rule:
    return Rule(f"left to {other}", lambda _: False)


_LIMIT = Rule(
    "a whole number of batches, a share above 0.0 and of at most 1.0, or null",
    lambda value: value is None or whole(1).holds(value) or (isinstance(value, float) and 0 < value <= 1),
)
#: Callbacks of Lightning that would train with other values than those that the run records.
_CHANGE_THE_RECIPE = ("LearningRateFinder", "BatchSizeFinder", "GradientAccumulationScheduler")
_CALLBACK = Rule(
    f"null or a node with a _target_, but for {', '.join(_CHANGE_THE_RECIPE)}: a run trains with the values that it "
    "records. sweeps/lr_wd.yaml searches a learning rate, and plan.py says what memory a batch needs",
    lambda value: MADE.holds(value) and (not value or not str(value["_target_"]).endswith(_CHANGE_THE_RECIPE)),
)


@dataclass(frozen=True)
class Open:
    """A node with keys of the user's own beside those of the table."""

    known: Mapping[str, Any]
    each: Rule = ANYTHING


Table = Mapping[str, Any]

_DATA: Table = {
    "name": TEXT,
    "dir": TEXT,
    "train_file": TEXT,
    "val_file": TEXT,
    "write_command": TEXT,
    "prepare": MADE,
    "num_classes": whole(1) | NULL,
    "resolution": whole(1),
    "stem_stride": whole(1),
    "train_transform": {"_target_": TEXT, "size": whole(1)},
    "val_transform": {"_target_": TEXT, "size": whole(1), "ratio": number(above=0)},
    "mean": list_of(number(), 3),
    "std": list_of(number(above=0), 3),
    "ops": choice("fused", "stock"),
    "num_threads": whole(1) | NULL,
    "batches_ahead": whole(1),
    "os_cache": YES_NO,
    "check": choice("sample", "full", "tables"),
}
_QUANTIZER: Table = {
    "_target_": TEXT,
    "images": whole(1),
    "file": TEXT,
    "per_channel": YES_NO,
    "seed": SEED,
}
_TRAIN: Table = {
    "seed": SEED,
    "experiment": TEXT | NULL,
    "tf32": YES_NO,
    "ddp_timeout_s": number(above=0),
    "compile": YES_NO,
    "recompute": YES_NO,
    "channels_last": YES_NO,
    "batchnorm": choice("rank0", "mean", "sync"),
    "ckpt_path": TEXT | NULL,
    "init_from": TEXT | NULL,
    "weights": TEXT | NULL,
    "int8": choice("onnxruntime", "torch") | NULL,
    "required": TEXTS,
    "block": {"norm": YES_NO, "branches": list_of(MADE), "stage": MADE},
    "root": TEXT,
    "output_dir": TEXT,
    "net": {
        "_target_": TEXT,
        "depths": list_of(whole(1)),
        "width_a": number(above=0),
        "width_b": number(above=0),
        "groups": whole(1),
        "squeeze_excite": YES_NO,
        "num_classes": whole(1) | NULL,  # null until the data's files have been looked at
        "in_channels": Rule("3: images have three channels", lambda value: value == 3),
        "strides": list_of(whole(1)),
    },
    "module": REPEATED,
    "datamodule": REPEATED,
    "bench": {
        "_target_": TEXT,
        "batch": whole(1),
        "resolution": whole(1),
        "dtype": choice("float32", "bfloat16", "float16"),
        "warmup": whole(0),
        "batches": whole(1),
        "every_n_epochs": whole(0),
    },
    "quantizer": _QUANTIZER,
    "run": {"project": TEXT, "name": TEXT | NULL, "group": TEXT | NULL, "tags": TEXTS, "id": TEXT | NULL},
    "data": _DATA,
    "trainer": {
        "_target_": TEXT,
        "accelerator": TEXT,
        "devices": Rule(
            "a number of devices, -1 or auto for all, or a list of indices",
            lambda value: (
                value in ("auto", -1)
                or whole(1).holds(value)
                or (list_of(whole(0)).holds(value) and value != [])
                or (isinstance(value, str) and re.fullmatch(r"\d+(,\d+)*", value) is not None)
            ),
        ),
        "num_nodes": whole(1),
        "precision": Rule(", ".join(PRECISIONS[:6]), lambda value: str(value) in PRECISIONS, CHOOSE),
        "max_epochs": whole(1),
        "min_epochs": whole(0) | NULL,
        "max_steps": whole(1) | Rule("-1", lambda value: value == -1),
        "accumulate_grad_batches": whole(1),
        "check_val_every_n_epoch": whole(1) | NULL,
        "limit_train_batches": _LIMIT,
        "limit_val_batches": _LIMIT,
        "limit_test_batches": _left_to("trainer.limit_val_batches: the test is on the validation's images"),
        "overfit_batches": _LIMIT | Rule("0", lambda value: value == 0),
        "val_check_interval": Rule("1.0, for check_val_every_n_epoch is what changes it", lambda value: value == 1.0),
        "use_distributed_sampler": Rule(
            "false, for the loader gives every rank its share", lambda value: value is False
        ),
        "fast_dev_run": YES_NO | whole(0),
        "log_every_n_steps": whole(0),
        "num_sanity_val_steps": whole(-1),
        "gradient_clip_val": number(0) | NULL,
        "enable_model_summary": YES_NO,
        "enable_progress_bar": YES_NO,
        "benchmark": YES_NO | NULL,
        "logger": _left_to("logger=OPTION"),
        "callbacks": _left_to("callbacks.NAME"),
        "plugins": _left_to("train.py"),
        "sync_batchnorm": _left_to("batchnorm=sync"),
    },
    "logger": Open({}, MADE),
    "callbacks": Open(
        {
            "interruption": {"_target_": TEXT, "every_minutes": number(above=0) | NULL},
            "ema": {"_target_": TEXT, "decay": number(0, 1)},
            "resize": {
                "_target_": TEXT,
                "start": whole(1),
                "end": whole(1),
                "begin": number(0, 1),
                "finish": number(0, 1),
            },
            "guard": {"_target_": TEXT, "on_nonfinite": choice("stop", "skip"), "max_skips": whole(1)},
            "two_forms": {"_target_": TEXT, "tolerance": number(above=0)},
            "int8": {"_target_": TEXT, "every_n_epochs": whole(0)},
            "perf": {"_target_": TEXT, "warn_share": number(0, 1)},
            "health": {"_target_": TEXT, "every_n_epochs": whole(0)},
            "checkpoints": {"_target_": TEXT, "monitor": TEXT, "every_n_epochs": whole(1)},
        },
        _CALLBACK,
    ),
    "recipe": {
        "epochs": whole(1),
        "batch_size": whole(1),
        "lr": number(above=0),
        "lr_batch": number(above=0),
        "warmup_epochs": number(0),
        "weight_decay": number(0),
        "decay_identity_gamma": YES_NO,
        "bias_lr_factor": number(above=0),
        "custom_l2": YES_NO,
        "label_smoothing": number(0, 1),
        "mixup": number(0),
        "rand_augment": MADE,
        "optimizer": {"_target_": TEXT, "lr": _left_to("recipe.lr"), "params": _left_to("train.py")},
    },
}
_EVALUATE: Table = {
    **_TRAIN,
    "ckpt": TEXT | NULL,
    "forms": choice("both", "train", "deploy") | NULL,
    "batch_size": whole(1),
    "resolution": whole(1) | NULL,
    "resize": whole(1) | NULL,
    "confusion": YES_NO,
}
_EXPORT: Table = {
    **_TRAIN,
    "ckpt": TEXT | NULL,
    "to": choice("onnx", "pt2") | NULL,
    "out": TEXT | NULL,
    "form": choice("train", "deploy") | NULL,
    "dynamic_size": YES_NO,
    "normalize": YES_NO,
    "opset": whole(11, 18),  # repvgg.deploy.export.OLDEST_OPSET and OPSET
    "classes": TEXT | NULL,
    "runtimes": TEXT | TEXTS | NULL,
    "check": choice("data", "random"),
    "check_images": TEXT | TEXTS | NULL,
    "images": whole(1),
    "tolerance": number(above=0),
}
_CONVERT: Table = {
    **_TRAIN,
    "net": {**_TRAIN["net"], "in_channels": whole(1)},
    "ckpt": TEXT | NULL,
    "out": TEXT | NULL,
    "form": choice("train", "deploy") | NULL,
    "naming": TEXT,
    "fold_dtype": choice("float64", "float32"),
    "check": YES_NO,
    "overwrite": YES_NO,
}
_PLAN: Table = {
    **_TRAIN,
    "out": TEXT | NULL,
    "plan": {
        "devices": list_of(whole(1)) | NULL,
        "batch_per_device": whole(1) | NULL,
        "images_per_s_per_gpu": number(above=0) | NULL | MAPPING,
        "bandwidth_gb_s": number(above=0) | NULL,
        "decode_images_per_core_s": number(above=0) | NULL,
        "train_images": whole(1) | NULL,
        "val_images": whole(1) | NULL,
        "short_side": whole(1) | NULL,
        "train_kb_per_image": number(above=0) | NULL,
        "val_kb_per_image": number(above=0) | NULL,
        "published": Open({}),
        "stored_kb": Open({}),
        "decoding": Open({}),
    },
}
_REPORT: Table = {
    "runs": TEXT | TEXTS | NULL,
    "target": choice("page", "wandb"),
    "out": TEXT | NULL,
    "title": TEXT | NULL,
    "reference": TEXT | NULL,
    "paper": TEXT | NULL,
    "ignore": TEXTS,
    "entity": TEXT | NULL,
    "project": TEXT | NULL,
}
_WRITE_DATASET: Table = {
    "root": TEXT,
    "splits": TEXTS,
    "write": {
        "_target_": TEXT,
        "write_mode": choice("jpg", "raw", "proportion"),
        "short_side": whole(1) | NULL,
        "max_resolution": whole(1) | NULL,
        "jpeg_quality": whole(1, 100),
        "compress_probability": number(0, 1),
        "pass_through": YES_NO,
    },
    "seed": SEED,
    "num_workers": whole(0) | NULL,
    "on_bad": choice("stop", "skip"),
    "verify": YES_NO,
    "adopt": YES_NO,
    "data": _DATA,
    "source": {"train": TEXT | NULL, "val": TEXT | NULL, "reader": MADE},
}
TABLES: Mapping[str, Table] = {
    "train": _TRAIN,
    "evaluate": _EVALUATE,
    "export": _EXPORT,
    "convert": _CONVERT,
    "plan": _PLAN,
    "report": _REPORT,
    "write_dataset": _WRITE_DATASET,
}
#: An interpolation of another key, and nothing else.
REFERENCE = re.compile(r"\$\{[\w.]+\}")
#: Keys of a table that a config may lack.
MAY_BE_MISSING = ("data.dir",)
#: What other programs call it.
OTHER_WORDS = {
    **dict.fromkeys(("lr_scheduler", "scheduler", "lr_schedule"), "recipe.warmup_epochs"),
    **dict.fromkeys(("learning_rate", "base_lr"), "recipe.lr"),
    **dict.fromkeys(("num_epochs", "n_epochs"), "recipe.epochs"),
    **dict.fromkeys(("workers", "num_workers"), "data.num_threads"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus"), "trainer.devices"),
    **dict.fromkeys(("arch", "backbone"), "model"),
    **dict.fromkeys(("dataset", "data_path", "data_dir"), "data.dir"),
    **dict.fromkeys(("resume", "checkpoint", "resume_from"), "ckpt_path"),
    **dict.fromkeys(("pretrained", "pretrained_path"), "init_from"),
    **dict.fromkeys(("amp", "fp16"), "trainer.precision"),
    "wd": "recipe.weight_decay",
}


def _has_target(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def wrong_values(
    command: str, config: Mapping[str, Any] | None, unresolved: Mapping[str, Any], groups: Sequence[str] = ()
) -> Iterator[str]:
    """A line for every key that nothing reads, every key that is missing, and every value that cannot be.

    Args:
        command: of `TABLES`.
        config: composed, resolved, of plain types, without Hydra's own node; what has no value is ``"???"``. None where
            it cannot be resolved, and no value is looked at.
        unresolved: the same with its interpolations as text. What one of them refers to is read, and only there its
            value is looked at.
        groups: that can be chosen, for the key that is meant.
    """
    values = dict(flat(unresolved))
    named = {name for value in values.values() for name in re.findall(r"\$\{([\w.]+)\}", str(value))}
    keys = {name for name in named if not name.startswith(".")}
    relative = {name.rpartition(".")[2] for name in named if name.startswith(".")}

    def is_referred_to(key: str) -> bool:
        return key in keys or any(name.startswith(f"{key}.") for name in keys) or key.rpartition(".")[2] in relative

    known = meant_keys(command, list(values), groups)
    for kind, key, value, rule in _walk(TABLES[command], config or unresolved, ""):
        if kind == "unread" and not is_referred_to(key):
            others = [other for other in known if other != key and not other.startswith(f"{key}.")]
            inner = [f"{key}.{name}" for name, _ in flat(value)] if isinstance(value, Mapping) else []
            yield nothing_reads(next((name for name in (key, *inner) if nearest(name, others)), key), others)
        elif kind == "missing":
            yield f"{key} is missing: {f'choose {key}=OPTION' if rule is NODE else f'it must be {rule.words}'}"
        elif kind == "wrong" and config is not None and REFERENCE.fullmatch(str(values.get(key))) is None:
            yield f"{key}={written(value)}{rule.verb} {rule.words}"
    names = {key.rpartition(".")[2] for key in known}
    for key, value in values.items():
        repeats = "${" in str(value) or value == "???"
        if key.startswith(_repeating(command)) and key.rpartition(".")[2] in names and not repeats:
            yield nothing_reads(key, known)


def _walk(table: Any, node: Any, prefix: str) -> Iterator[tuple[str, str, Any, Rule]]:
    """Kind of fault, key, value and rule."""
    known = table.known if isinstance(table, Open) else table
    for key, value in node.items():
        name = f"{prefix}{key}"
        rule = known.get(key)
        if rule is None and isinstance(table, Open):
            rule = table.each
        if rule is None:
            if not _has_target(node):  # whose keys are for the target to know
                yield "unread", name, value, ANYTHING
        elif isinstance(rule, Rule):
            if value == "???":
                yield "missing", name, value, rule
            elif not rule.holds(value):
                made = rule is MADE or isinstance(table, Open)
                unread = (
                    made and isinstance(value, Mapping) and not _has_target(value)
                )  # for nothing makes anything of it
                yield "unread" if unread else "wrong", name, value, rule
        elif isinstance(value, Mapping):
            yield from _walk(rule, value, f"{name}.")
        elif not (value is None and isinstance(table, Open)):  # callbacks.ema=null
            yield "wrong", name, value, NODE
    if not isinstance(table, Open):
        for key, rule in known.items():
            if key not in node and f"{prefix}{key}" not in MAY_BE_MISSING and not _has_target(node):
                yield "missing", f"{prefix}{key}", None, rule if isinstance(rule, Rule) else NODE


def written(value: Any) -> str:
    """A value as it is typed behind ``key=``."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _repeating(command: str) -> tuple[str, ...]:
    return tuple(f"{node}." for node, rule in TABLES[command].items() if rule is REPEATED)


def meant_keys(command: str, keys: Sequence[str], groups: Sequence[str]) -> list[str]:
    """What a user may mean: groups, and keys but for those that only repeat others."""
    return [*groups, *(key for key in keys if not key.startswith(_repeating(command)) and not key.endswith("_"))]


# --- the key that is meant --------------------------------------------------------------------------------------------


def nothing_reads(key: str, known: Sequence[str]) -> str:
    """The error of a key that nothing reads: the known key that may be meant, and the keys beside it."""
    meant = nearest(key, known)
    beside = (meant[0] if meant else key).rpartition(".")[0]
    siblings = dict.fromkeys(
        other.removeprefix(f"{beside}.").partition(".")[0]
        for other in known
        if not beside or other.startswith(f"{beside}.")
    )
    suggestion = f" Did you mean {' or '.join(meant)}?" if meant else ""
    return f"nothing reads {key}.{suggestion} Keys of {beside or 'the config'}: {', '.join(siblings)}"


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """The keys, three at most, that a mistyped or misplaced key may stand for; the likeliest first."""
    parent, _, leaf = key.rpartition(".")
    if (other := OTHER_WORDS.get(leaf)) in known or (other is not None and "." not in other):
        return [str(other)]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    if same:
        return sorted(same, key=lambda name: (name.count("."), -difflib.SequenceMatcher(None, name, key).ratio()))[:3]
    depth = parent.count(".") + 1 if parent else 0
    beside = dict.fromkeys(
        ".".join(name.split(".")[: depth + 1]) for name in known if not parent or name.startswith(f"{parent}.")
    )
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    if close := difflib.get_close_matches(key, beside, n=1, cutoff=0.7):
        return close
    return [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
