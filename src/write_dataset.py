"""Write the .beton files of a data set: `python src/write_dataset.py --help` says how."""

import signal
import sys
from pathlib import Path

import hydra
import hydra.utils
from omegaconf import DictConfig

from repvgg.cli import clear_errors, prepare_environment
from repvgg.command import answering
from repvgg.data.manifest import suggested

FLAGS = {"--verify": "verify=true", "--adopt": "adopt=true"}


def write(cfg: DictConfig) -> None:
    """Write what the configuration asks for; raise ValueError when it does not say enough."""
    needed = ["dir"] if "dir" in cfg.source else cfg.splits
    missing = [f"source.{key}" for key in needed if cfg.source[key] is None]
    if cfg.data.prepare is None and missing:
        raise ValueError(
            f"{' and '.join(missing)} must say where the images are, for example\n"
            f"  {suggested(cfg.data.write_command, cfg.data.dir)}\n"
            "Class folders (source.train=… source.val=…), source=ilsvrc_tars or source=huggingface: see --help"
        )

    # Imports that take seconds wait until the command has proved right.
    if cfg.data.prepare is not None:
        hydra.utils.instantiate(cfg.data.prepare)()
        print(f"{cfg.data.train_file} and {cfg.data.val_file} are there and sound")
        return
    from repvgg.data.folders import kinds
    from repvgg.data.sources import require_same_classes
    from repvgg.data.write import write_beton

    options, reader = hydra.utils.instantiate(cfg.write), hydra.utils.instantiate(cfg.source.reader)
    sources = {split: reader(cfg.source[split]) for split in cfg.splits}
    if len(sources) == 2:
        require_same_classes(sources["train"], sources["val"])
    for split, source in sources.items():
        path = Path(cfg.data[f"{split}_file"])
        manifest = write_beton(
            source, path, options=options, seed=cfg.seed, num_workers=cfg.num_workers, on_bad=cfg.on_bad
        )
        left_out = f", {len(manifest.skipped)} left out" if manifest.skipped else ""
        not_read = f"; not read: {kinds(source.not_read)}" if source.not_read else ""
        print(
            f"{path.absolute()}: {manifest.samples} images of {len(manifest.classes)} classes{left_out}{not_read}",
            flush=True,
        )


def check(cfg: DictConfig) -> None:
    """Verify files, or adopt them; one line each. Raise ValueError in the end when one is bad."""
    paths = [Path(cfg.data[f"{split}_file"]) for split in cfg.splits]
    from repvgg.data.manifest import read_manifest
    from repvgg.data.verify import read_records, verify_beton
    from repvgg.data.write import adopt_beton, classes_needed

    classes = classes_needed(paths) if cfg.adopt else None
    problems = []
    for path in paths:
        try:
            read_records(path)  # says in a moment whether there is such a file
            manifest = adopt_beton(path, classes=classes) if cfg.adopt else read_manifest(path)
            if not cfg.adopt:
                verify_beton(path, decode=True, show_progress=True)
            print(f"{path.absolute()}: {manifest.samples} images of {len(manifest.classes)} classes, sound", flush=True)
        except ValueError as problem:
            print(f"{path.absolute()}: not sound", flush=True)
            problems.append(str(problem))
    if problems:
        raise ValueError("\n".join(problems))


@hydra.main(version_base="1.3", config_path="../conf", config_name="write_dataset")
def main(cfg: DictConfig) -> None:
    """Write, or say in one message what is wrong."""
    with clear_errors():
        unknown = [split for split in cfg.splits if split not in ("train", "val")]
        if unknown or not cfg.splits:
            raise ValueError(f"splits must be [train], [val] or [train,val], got {list(cfg.splits)}")
        try:
            (check if cfg.verify or cfg.adopt else write)(cfg)
        except OSError as error:
            raise ValueError(f"{error.filename or 'a file'}: {error.strerror or error}") from error


if __name__ == "__main__":
    prepare_environment()
    sys.argv[1:] = [FLAGS.get(argument, argument) for argument in sys.argv[1:]]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with answering("write_dataset", sys.argv[1:]):
            main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
