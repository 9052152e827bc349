"""Write the .beton files of a data set: `python src/write_dataset.py --help` says how."""

from pathlib import Path

import hydra
import hydra.utils
from omegaconf import DictConfig

from repvgg.cli import clear_errors, prepare_environment


def write(cfg: DictConfig) -> None:
    """Write what the configuration asks for; raise ValueError when it does not say enough."""
    missing = [f"source.{split}" for split in ("train", "val") if cfg.source[split] is None]
    if cfg.data.prepare is None and missing:
        raise ValueError(f"{' and '.join(missing)} must name a folder of class folders:\n  {cfg.data.write_command}")

    # Imports that take seconds wait until the command has proved right.
    if cfg.data.prepare is not None:
        hydra.utils.instantiate(cfg.data.prepare)()
        print(f"{cfg.data.train_file} and {cfg.data.val_file} are there and sound")
        return
    from repvgg.data.sources import ImageFolder, require_same_classes

    train, val = ImageFolder(cfg.source.train), ImageFolder(cfg.source.val)
    require_same_classes(train, val)
    from repvgg.data.write import write_beton

    options = hydra.utils.instantiate(cfg.write)
    for source, path in ((train, cfg.data.train_file), (val, cfg.data.val_file)):
        manifest = write_beton(source, path, options=options, seed=cfg.seed, num_workers=cfg.num_workers)
        print(f"{Path(path).absolute()}: {manifest.samples} images of {len(manifest.classes)} classes")


@hydra.main(version_base="1.3", config_path="../conf", config_name="write_dataset")
def main(cfg: DictConfig) -> None:
    """Write, or say in one message what is wrong."""
    with clear_errors():
        write(cfg)


if __name__ == "__main__":
    prepare_environment()
    main()
