"""Which run a command is: the same command again goes on with the same run, in the same folder.

    python src/train.py model=repvgg_b1 seed=1               outputs/B1-full-s1-8c1f03
    python src/train.py -m ablation=plain,id seed=1,2        multirun/ablation-seed-5d0e7a

The folder's name ends in a hash of what was typed, less what changes no result. In the folder, `run.json` keeps what
the run was begun with, so that a folder is never continued as something else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repvgg.files import replacing
from repvgg.influence import comparable, flat, is_under, may_differ, names_a_folder

log = logging.getLogger(__name__)

FILE, LOCK = "run.json", ".lock"
#: Keys that say what a run begins with, which is the checkpoint where one goes on from it.
HOW_IT_BEGAN = ("ckpt_path", "init_from", "experiment")
HASH_LENGTH = 6
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def key_of(override: str) -> str:
    """``a.b`` of the override ``+a.b=1``."""
    return override.lstrip("+~").partition("=")[0]


def fingerprint(overrides: Iterable[str]) -> str:
    """Six hexadecimal digits that stand for a set of overrides, in whatever order, less those without influence."""
    told = sorted(o for o in overrides if names_a_folder(key_of(o)))
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:HASH_LENGTH]


def subject(choices: Mapping[str, str]) -> str:
    """What a run is about: B0-id, and B0-id-digits where the data is not ImageNet."""
    model = choices["model"].removeprefix("repvgg_")
    return on_data(f"{model[0].upper()}{model[1:]}-{choices['ablation']}", choices)


def on_data(name: str, choices: Mapping[str, str]) -> str:
    """The name with the data set's, unless that is ImageNet."""
    return name if choices["data"] == "imagenet" else f"{name}-{choices['data']}"


def run_name(choices: Mapping[str, str], seed: int) -> str:
    """Short and readable: B0-id-s1 (and B0-id-digits-s1 where the data is not ImageNet)."""
    return f"{subject(choices)}-s{seed}"


def run_folder(*, _root_: DictConfig) -> str:
    """`${run_folder:}`: run.id, or name and fingerprint of the run.

    Of a W&B agent's run the fingerprint is its id: a sweep may ask for the same values twice, and means two runs.
    """
    if _root_.run.id is not None:
        return require_id(str(_root_.run.id))
    name = run_name(_root_.hydra.runtime.choices, _root_.seed)
    if "WANDB_SWEEP_ID" in os.environ:
        return f"{name}-{os.environ.get('WANDB_RUN_ID', '')}".rstrip("-")
    return f"{name}-{fingerprint(_root_.hydra.overrides.task)}"


def sweep_folder(*, _root_: DictConfig) -> str:
    """`${sweep_folder:}`: what is varied, and the fingerprint of all that was typed."""
    typed = list(_root_.hydra.overrides.task)
    varied = [key_of(o).rpartition(".")[2] for o in typed if _has_several(o.partition("=")[2])]
    experiments = [o.partition("=")[2].strip("[]'\"").replace(",", "_") for o in typed if key_of(o) == "experiment"]
    named = re.sub(r"[^A-Za-z0-9_-]", "", "-".join([*experiments, *varied])[:60])
    return f"{named or 'sweep'}-{fingerprint(typed)}"


def job_folder(*, _root_: DictConfig) -> str:
    """`${job_folder:}`: the number of a sweep's job, and what varies in the sweep.

    The keys that do not are in `hydra.job.config.override_dirname.exclude_keys`, where `repvgg.command` puts them.
    """
    fixed = _root_.hydra.job.config.override_dirname.exclude_keys
    varied = ",".join(sorted(o for o in _root_.hydra.overrides.task if key_of(o) not in fixed))
    return _file_name("_".join(filter(None, [str(_root_.hydra.job.num), varied])))


def evaluation_folder(*, _root_: DictConfig) -> str:
    """`${evaluation_folder:}`: "eval", `run.id` or what is evaluated (a run's folder, a file), and the fingerprint."""
    if _root_.run.id is not None:
        return f"eval-{require_id(str(_root_.run.id))}"
    file = Path(str(_root_.ckpt)).absolute()
    of_a_run = file.parent.name == "checkpoints"
    name = "-".join([file.parent.parent.name, *([] if file.stem == "best" else [file.stem])]) if of_a_run else file.stem
    return f"{_file_name(f'eval-{name}')}-{fingerprint(_root_.hydra.overrides.task)}"


def _file_name(text: str, length: int = 80) -> str:
    """The text as a file's name, shortened; a hash then tells it from others that begin alike."""
    name = re.sub(r"[^\w.,=+~-]", "_", text, flags=re.ASCII)
    if len(name) <= length:
        return name
    return f"{name[: length - HASH_LENGTH - 1]}-{hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]}"


def _has_several(value: str) -> bool:
    """Whether an override sweeps: commas outside of brackets, or one of Hydra's functions."""
    outside = re.sub(r"\[[^\[\]]*\]|\{[^{}]*\}", "", value)
    return "," in outside or re.match(r"(range|choice|interval|glob|tag|shuffle|sort)\(", value) is not None


def require_typed_id(arguments: Sequence[str]) -> None:
    """Raise ValueError for a `run.id=` that cannot name a run, before Hydra makes a folder of it."""
    for argument in arguments:
        if argument.startswith("run.id=") and argument not in ("run.id=", "run.id=null"):
            require_id(argument.partition("=")[2])
            if {"-m", "--multirun"} & set(arguments):
                raise ValueError(f"{argument} names one run, and -m starts several: name hydra.sweep.dir= instead")


def with_drawn_seed(arguments: Sequence[str]) -> list[str]:
    """The arguments with a number in the place of `seed=null`, so that a run's folder, name and records have it.

    Neither of a sweep, which would change its folder, nor in one of several processes, which would draw another.
    """
    sweep = {"-m", "--multirun"} & set(arguments)
    several = sweep or "RANK" in os.environ or os.environ.get("SLURM_NTASKS", "1") != "1"
    if "seed=null" not in arguments or several:
        return list(arguments)
    seed = f"seed={secrets.randbelow(2**32)}"
    print(f"seed=null: drawn is {seed}, with which the same command goes on")
    return [seed if argument == "seed=null" else argument for argument in arguments]


def require_id(name: str) -> str:
    """Raise ValueError unless a name can be a folder's and a W&B run's."""
    if not ID.fullmatch(name):
        raise ValueError(f"run.id={name}: choose up to 64 letters, digits, and _ . - that begin with a letter or digit")
    return name


OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
OmegaConf.register_new_resolver("evaluation_folder", evaluation_folder, replace=True)


@dataclass(frozen=True)
class Identity:
    """What `run.json` keeps. `id` is W&B's; `begun` is UTC; `config` is the logged one of the first start."""

    id: str
    begun: str
    overrides: list[str]
    config: dict[str, Any]

    def write(self, directory: str | Path) -> None:
        """Once the training is about to begin."""
        with replacing(Path(directory) / FILE) as file:
            file.write(f"{json.dumps(asdict(self), indent=2)}\n".encode())


def claim(
    directory: str | Path, config: Mapping[str, Any], overrides: Sequence[str], *, begun: bool, id: str | None = None
) -> Identity:
    """The identity of the run in a directory, or a new one; call it on one rank.

    The directory is locked as long as this process lives.

    Args:
        config: nested and resolved, as it is logged. Of a continued run it must be that of its first start, see
            `require_same`.
        overrides: that were typed.
        begun: whether there is something to continue. A folder in which no training got anywhere is anyone's.
        id: for W&B, of a new run; None draws one.

    Raises:
        ValueError: another process trains there, or the directory is another run's.
    """
    directory = Path(directory)
    _lock(directory)
    earlier = read_identity(directory)
    if earlier is not None:
        try:
            require_same(earlier, config, overrides, directory)
        except ValueError:
            if begun:
                raise
        else:
            return earlier
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new_id = id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    return Identity(new_id, now, list(overrides), plain(config))


def read_identity(directory: str | Path) -> Identity | None:
    """What `run.json` says; None where there is none.

    Raises ValueError if it cannot be read.
    """
    path = Path(directory) / FILE
    try:
        return Identity(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the file of a run ({error}): move the folder away, or give run.id=") from error


def require_same(earlier: Identity, config: Mapping[str, Any], overrides: Sequence[str], directory: Path) -> None:
    """Raise ValueError, with the keys that differ, where a run would be continued as another.

    A key that is on one side only is a difference too if one of the two commands set it, or if both ran the same
    commit. Else another version of the repository has brought or removed the key with its default, and a warning names
    it. What `repvgg.influence` says may differ may be on one side as well.
    """
    now, then = dict(flat(plain(config))), dict(flat(earlier.config))
    keys = [key for key in {**then, **now} if not may_differ(key)]
    one_sided = [key for key in keys if (key in then) != (key in now)]
    typed = [key_of(override) for override in set(earlier.overrides) ^ set(overrides)]
    same_commit = _commit(now) is not None and _commit(now) == _commit(then)
    of_versions = [key for key in one_sided if not same_commit and not any(_is_set_by(name, key) for name in typed)]
    both = [key for key in keys if key in then and key in now]
    differing = [
        f"{key}={then[key]} is {now[key]} now"
        for key in both
        if comparable(key, then[key]) != comparable(key, now[key])
    ]
    differing += [
        f"{key}={then[key]} is not there now" if key in then else f"{key}={now[key]} was not there"
        for key in one_sided
        if key not in of_versions
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{directory} holds a run that was begun with other values: {'; '.join(differing[:3])}{more}. It was\n"
            f"  {' '.join(earlier.overrides)}\nGive another run.id=NAME (or hydra.run.dir=) for a new run"
        )
    if of_versions:
        log.warning("the run was begun by another version of the configs: %s", ", ".join(sorted(of_versions)[:5]))
    for key in ("git.sha", "versions.torch"):
        if key in then and key in now and then[key] != now[key]:
            log.warning("the run was begun with %s %s, and goes on with %s", key, then[key], now[key])


def hyper_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a logged config can change a result: dotted keys, plain types, none of the run's own paths."""
    own = str(config["output_dir"])
    values = flat(plain(config))
    return {k: v for k, v in values if not may_differ(k) and k not in HOW_IT_BEGAN and not str(v).startswith(own)}


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``recipe.lr 0.1 → 0.05`` for every key that differs between two runs' :func:`hyper_parameters`."""
    keys = {**earlier, **now}
    return [f"{k} {earlier.get(k)} → {now.get(k)}" for k in keys if earlier.get(k) != now.get(k)]


def _is_set_by(typed: str, key: str) -> bool:
    """Whether an override of a key sets another: it is that key, above it, below it, or a group that was chosen."""
    return is_under(key, typed) or is_under(typed, key) or key == f"choices.{typed}"


def _commit(config: Mapping[str, Any]) -> str | None:
    """The commit in a flat config, without ``-dirty``: changes in the working tree belong to whoever types."""
    sha = str(config.get("git.sha", "unknown")).removesuffix("-dirty")
    return None if sha == "unknown" else sha


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Types of JSON alone, as what is written and read back."""
    plain_types: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain_types


_locks: dict[Path, Any] = {}


def is_free(directory: Path) -> bool:
    """Whether no other process has claimed the directory."""
    path = (directory / LOCK).resolve()
    return path in _locks or not path.exists()


def _lock(directory: Path) -> None:
    """For as long as the process lives; the system releases it however that ends."""
    directory.mkdir(parents=True, exist_ok=True)
    path = (directory / LOCK).resolve()
    if path in _locks:
        return
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"{directory} is being trained by {owner}: wait for it, stop it, or give run.id=NAME for a second run"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[path] = file
