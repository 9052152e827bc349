"""What the entry points share: one clear error for a wrong input, names, and the config that is logged.

Imports nothing heavy: a mistyped command must answer at once.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from repvgg.identity import is_free, key_of, on_data
from repvgg.influence import UNREAD, is_under
from repvgg.slurm import is_first_rank

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from repvgg.report.record import RunRecord

log = logging.getLogger(__name__)

#: Groups whose values do not stand under their own name, so that a W&B sweep over them keeps the config whole.
NODE_OF_GROUP = {"model": "net", "ablation": "block"}
ROOT = Path(__file__).resolve().parents[2]
#: What train.py returns and a sweep maximises: the best checkpoint's.
OBJECTIVE = "test/deploy/top1"
#: Exit code of a command that was not started, because its input is wrong.
WRONG_INPUT = 2


def prepare_environment() -> None:
    """What the configs read; call it before Hydra's main."""
    os.environ.setdefault("PROJECT_ROOT", str(ROOT))


def require_checkpoint(ckpt: str | None, script: str, more: str = "") -> None:
    """Raise ValueError, with a command of ``src/SCRIPT.py``, where ``ckpt=`` is missing or names no file."""
    if ckpt is None or not Path(ckpt).is_file():
        missing = "ckpt=PATH is missing" if ckpt is None else f"ckpt={ckpt}: there is no such file"
        raise ValueError(
            f"{missing}. Of a run it is\n  python src/{script}.py ckpt=RUN/checkpoints/best.ckpt{more and ' '}{more}"
        )


def typed_of(overrides: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Those of ``overrides`` whose key is one of ``keys``, or under one."""
    return [o for o in overrides if any(is_under(key_of(o), key) for key in keys)]


def require_read(overrides: Sequence[str], command: str) -> None:
    """Raise ValueError for overrides of train.yaml that ``command``, which takes a checkpoint, does not read."""
    unread = UNREAD[command]
    if ignored := typed_of(overrides, unread):
        reasons = [f"{key} ({why})" for key, why in unread.items() if typed_of(ignored, [key])]
        raise ValueError(f"{' '.join(ignored)}: {command}.py does not read {', '.join(reasons)}")


@contextmanager
def no_collections() -> Iterator[None]:
    """While torch, Lightning and W&B are imported, look for no garbage: nearly all that they make stays.

    Looking takes a fifth of their imports' time. What is there afterwards is never looked at again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def clear_errors(setting_up: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """While a run is being set up, a ValueError is a wrong input: print it alone and exit with 2.

    ``setting_up`` says whether it still is when the error comes. An error with an ``exit_code`` says enough by itself.
    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        node = ""
        # Hydra wraps what a constructor raises.
        while type(cause).__name__ == "InstantiationException" and cause.__cause__ is not None:
            node = str(cause).partition("full_key: ")[2].strip() or node
            cause = cause.__cause__
        refused = (ValueError, TypeError, ImportError) if node else ValueError
        wrong_input = isinstance(cause, refused) or type(cause).__name__ in (
            "InstantiationException",
            "MisconfigurationException",
        )
        # Such as RankLostError: its message says it all, whenever it comes.
        exit_code = getattr(cause, "exit_code", WRONG_INPUT if wrong_input and setting_up() else None)
        if exit_code is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        # What this repository refuses names the key.
        of_node = f"{node}: " if node and not _is_raised_here(cause) else ""
        print(f"error: {of_node}{cause}", file=sys.stderr)
        if exit_code == WRONG_INPUT and setting_up():  # what was trained stays, whatever ended it
            _remove_new_folder()
        sys.exit(exit_code)


def _is_raised_here(error: BaseException) -> bool:
    """Whether one of our own lines says ``raise``, and not something that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and frames[-1].filename.startswith(str(ROOT / "src"))


_new_folder: list[Path] = []


def folder_to_be(directory: Path) -> None:
    """Remember the folder that Hydra is about to make for a single run, and the parents that it lacks.

    :func:`clear_errors` removes them again if the command proves to be wrong later.
    """
    in_a_sweep, first = "MULTIRUN_DIR" in os.environ, is_first_rank()
    _new_folder[:] = [] if in_a_sweep or not first else [d for d in (directory, *directory.parents) if not d.exists()]


def _remove_new_folder() -> None:
    """Remove what the command has made, unless another process trains there by now."""
    if not _new_folder or not is_free(_new_folder[0]) or any(_new_folder[0].rglob("*.ckpt")):
        return
    logging.shutdown()  # the job's log is in it
    shutil.rmtree(_new_folder[0], ignore_errors=True)
    for parent in _new_folder[1:]:
        with suppress(OSError):  # another run's is in it
            parent.rmdir()
    _new_folder.clear()


@contextmanager
def recorded(
    trainer: Trainer, config: Mapping[str, Any], metrics: dict[str, float], *, directory: str, objective: str
) -> Iterator[None]:
    """Whatever ends the block, the loggers are closed and result.json in ``directory`` says how it ended.

    ``metrics`` are what the block has put there by then, and what was logged last if it did not come to its end.
    """
    from repvgg.learn.checkpoint import Interrupted
    from repvgg.learn.run import close_loggers, conclusion, last_metrics
    from repvgg.report.record import Status, write_record

    status: Status = "failed"
    error: str | None = None
    exit_code = 1
    refused = False
    try:
        yield
        status, exit_code = "finished", 0
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            status, error = "dry run", "trainer.fast_dev_run: a batch of everything, and nothing is kept"
    except Interrupted as stop:
        status, exit_code, error = "interrupted", int(str(stop.code)), stop.reason
        raise
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
        refused = isinstance(failure, ValueError) and trainer.global_step == 0  # clear_errors says it
        raise
    finally:
        if status != "finished":
            metrics |= last_metrics(trainer)
        try:
            if trainer.is_global_zero:
                value = metrics.get(objective) if status != "dry run" else None
                write_record(directory, status=status, config=config, metrics=metrics, objective=value, error=error)
        finally:  # after the record, since W&B may have to be waited for; without one too, where the disk is full
            close_loggers(trainer, metrics, exit_code, preempted=exit_code not in (0, 1, 130))
        if trainer.is_global_zero and not refused:
            said = {"interrupted": f"interrupted by {error}", "dry run": f"was a dry run ({error})"}.get(status, status)
            log.info(conclusion(config["run"]["name"], said, metrics, directory))


def finished_before(directory: str, config: Mapping[str, Any], overrides: Sequence[str]) -> RunRecord | None:
    """The record of this command's run, if that has come to its end already; then say what came of it.

    ``config`` and ``overrides`` are what :func:`repvgg.identity.claim` takes.

    Raises:
        ValueError: the directory is another run's.
    """
    from repvgg.identity import read_identity, require_same
    from repvgg.report.record import RECORD, read_record

    earlier = read_identity(directory)
    if earlier is None or not (Path(directory) / RECORD).exists():
        return None
    record = read_record(directory)
    if record.status != "finished":
        return None
    require_same(earlier, config, overrides, Path(directory))
    score = "" if record.objective is None else f" with {OBJECTIVE} {record.objective:.2%}"
    log.info(
        f"{record.config['run']['name']} is finished already{score}: {directory}. To train it again, give run.id=NAME, "
        "or delete that folder"
    )
    return record


@contextmanager
def interruptible(left: str) -> Iterator[None]:
    """After Ctrl-C, say in one line what is ``left`` and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped: {left}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def options(group: str) -> list[str]:
    """The options of a group of conf/."""
    return sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))


def run_group(choices: Mapping[str, str], experiment: str | None) -> str | None:
    """The experiment, as in table6 or table6-digits; else the last two folders of the multirun, if it is one."""
    if experiment is not None:
        return on_data(experiment, choices)
    directory = os.environ.get("MULTIRUN_DIR") or _sweep_directory()
    return "/".join(Path(directory).parts[-2:]) if directory else None


def _sweep_directory() -> str | None:
    """Of a sweep whose launcher runs the job itself, as submitit's do."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    return str(hydra.sweep.dir) if hydra is not None and hydra.mode == RunMode.MULTIRUN else None


def logged_config(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """The config as it is logged: nested, resolved, plain types, with the groups' options under ``choices``.

    Of `REPEATING` nodes only what is not as in train.yaml is there; None is what was removed.
    """
    usual = _as_in_the_file()
    shown = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("logger", *REPEATING)])
    config = OmegaConf.to_container(shown, resolve=True)
    assert isinstance(config, dict)
    for node in REPEATING:
        was, now = (OmegaConf.to_container(of[node]) if of.get(node) else {} for of in (usual, cfg))
        assert isinstance(was, dict)
        assert isinstance(now, dict)
        own = [key for key in {**was, **now} if (key in was, was.get(key)) != (key in now, now.get(key))]
        resolved = OmegaConf.to_container(cfg[node], resolve=True) if own and now else {}
        assert isinstance(resolved, dict)
        if own:
            config[node] = {key: resolved.get(key) for key in own}
    return {**{str(k): v for k, v in config.items()}, "choices": dict(choices)}


@cache
def _as_in_the_file() -> DictConfig:
    """The content of train.yaml, which takes a while to read."""
    config = OmegaConf.load(ROOT / "conf" / "train.yaml")
    assert isinstance(config, DictConfig)
    return config


#: Nodes that repeat values of others as interpolations.
REPEATING = ("module", "datamodule")


# --- paths that are typed ---------------------------------------------------------------------------------------------


def quote_paths(arguments: Sequence[str], keys: Sequence[str], *, new: Sequence[str] = ()) -> list[str]:
    """Arguments of which ``key=PATH`` is quoted where PATH is there, and so every PATH of ``key=[PATH,PATH]``.

    Of the keys ``new``, whose file is yet to be written, PATH is quoted where its directory is there.

    Hydra's grammar has no bare = or comma in a value, and a sweep's directories are called ``0_ablation=id``.
    """
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in new and _is_there(str(Path(value).parent)):
            argument = f"{key}={_quoted(value)}"
        if key in keys and equals:
            is_list = value.startswith("[") and value.endswith("]")
            argument = f"{key}=[{_quote_parts(value[1:-1])}]" if is_list else f"{key}={_quote(value)}"
        quoted.append(argument)
    return quoted


def _quote(value: str) -> str:
    return _quoted(value) if _is_there(value) else value


def _quoted(value: str) -> str:
    bare = set(value) & set("=,") and not value.startswith(("'", '"'))
    return f"'{value.replace(chr(39), chr(92) + chr(39))}'" if bare else value


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # longer than a path can be
        return False


def _quote_parts(text: str) -> str:
    """Between commas, the longest that is a path is one part."""
    parts, quoted = text.split(","), []
    while parts:
        taken = next((n for n in range(len(parts), 1, -1) if _is_there(",".join(parts[:n]))), 1)
        quoted.append(_quote(",".join(parts[:taken])))
        parts = parts[taken:]
    return ",".join(quoted)
