"""Compare runs on one page: `python src/report.py --help` says how."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, ListConfig

from repvgg.cli import clear_errors, interruptible, prepare_environment, quote_paths
from repvgg.command import answering


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
def main(cfg: DictConfig) -> None:
    """Check, read, compare, write."""
    with clear_errors():
        if cfg.runs is None or cfg.runs == []:
            raise ValueError("runs=PLACE is missing: where the runs are, as in\n  python src/report.py runs=multirun")
        places = [str(place) for place in (cfg.runs if isinstance(cfg.runs, ListConfig) else [cfg.runs])]
        out = Path(cfg.out) if cfg.out is not None else default_out(places)

        from repvgg.report import page
        from repvgg.report.compare import compare
        from repvgg.report.runs import read_runs

        if cfg.target == "page":
            unread = [f"{key}={cfg[key]}" for key in ("entity", "project") if cfg[key] is not None]
            if unread:
                raise ValueError(f"{' '.join(unread)} is of target=wandb: a page is a directory, out=DIRECTORY")
            page.require_own(out)
        elif cfg.out is not None:
            raise ValueError(f"out={cfg.out} is of target=page: a report in W&B leaves no files here")
        runs, notes = read_runs(places)
        comparison = compare(runs, reference=cfg.reference, paper=cfg.paper, ignore=list(cfg.ignore), notes=notes)
        if cfg.target == "wandb":
            from repvgg.report.workspace import destination, publish_comparison

            entity, project = destination(places, cfg.entity, cfg.project)
            print(publish_comparison(comparison, entity=entity, project=project, title=cfg.title))
            return
        for path in page.write_page(comparison, out, cfg.title):
            print(path)


def default_out(places: list[str]) -> Path:
    """`report` in the first place that is a directory."""
    directories = [Path(place) for place in places if Path(place).is_dir()]
    return (directories[0] if directories else Path()) / "report"


if __name__ == "__main__":
    prepare_environment()
    sys.argv[1:] = quote_paths(sys.argv[1:], ["runs", "out"])
    with interruptible("the same command makes the report anew"), answering("report", sys.argv[1:]):
        main()
