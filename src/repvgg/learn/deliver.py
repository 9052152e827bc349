"""Send W&B what it has not got of a run: `python -m repvgg.learn.deliver RUN_DIRECTORY`.

For a run that ended while the server was away. `wandb sync` sends a file from its first row on; this sends the rows
that are missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from repvgg import wandb_file
from repvgg.learn.logging import RunLogger


def deliver(directory: str | Path) -> None:
    """Send the rows, and the last start's config, summary and exit code.

    Raises ValueError if there is no W&B file below ``directory/wandb``, if they are of several runs, or as `RunLogger`.
    """
    directory = Path(directory)
    files = wandb_file.find(directory / "wandb")
    names = sorted({file.stem for file in files})
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise ValueError(
            f"{directory}/wandb holds the files of {len(names)} W&B runs ({found}): give a run's directory"
        )
    run, config, summary, exit_code = _outcome(files[-1])
    logger = RunLogger(
        mode="online",
        project=run.project,
        save_dir=str(directory),
        name=run.display_name or None,
        group=run.run_group or None,
        tags=list(run.tags) or None,
        job_type=run.job_type,
        id=run.run_id,
    )
    logger.log_hyperparams(config)
    logger.finish(summary, exit_code)


def _outcome(file: Path) -> tuple[Any, dict[str, Any], dict[str, Any], int]:
    """The run's own record, config, summary, and exit code: 1 of one that was killed."""
    run, exit_code = None, 1
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in wandb_file.records(file):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                wandb_file.update(config, run.config)
                wandb_file.update(summary, run.summary)
            case "config":
                wandb_file.update(config, record.config)
            case "summary":
                wandb_file.update(summary, record.summary)
            case "exit":
                exit_code = record.exit.exit_code
    if run is None:
        raise ValueError(f"{file} ends before it says of which run it is: there is nothing to send")
    config.pop("_wandb", None)
    return run, config, {key: value for key, value in summary.items() if not key.startswith("_")}, exit_code


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m repvgg.learn.deliver RUN_DIRECTORY")
    try:
        deliver(sys.argv[1])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
