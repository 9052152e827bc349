"""A checkpoint as a file that another program runs: `python src/export.py --help` has examples."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from repvgg.cli import (
    clear_errors,
    interruptible,
    prepare_environment,
    quote_paths,
    require_checkpoint,
    require_read,
)
from repvgg.command import answering
from repvgg.data.manifest import DatasetMissingError, read_manifest, require_files, suggested
from repvgg.deploy.int8_options import require_int8

if TYPE_CHECKING:
    from torch import Tensor

    from repvgg.checkpoints import Network
    from repvgg.deploy.preprocess import Preprocessing
    from repvgg.model import Weights

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}
#: Packages that write a format, beside torch.
WRITERS: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript"), "pt2": ()}
BATCH = 32


def check(cfg: DictConfig) -> tuple[str, Path]:
    """What can be wrong before anything is imported; the format and the file to write."""
    typed = list(HydraConfig.get().overrides.task)
    require_read(typed, "export")
    require_checkpoint(cfg.ckpt, "export")
    if cfg.check == "random" and cfg.check_images is not None:
        raise ValueError("check=random and check_images are two ways to check: give one of them")
    if not {"size", "ratio"} <= set(cfg.data.val_transform):
        raise ValueError(
            f"data.val_transform={cfg.data.val_transform.get('_target_')}: an exported file describes a CenterCrop, of "
            "size= and ratio="
        )
    for path in [*check_paths(cfg), *([] if cfg.classes is None else [cfg.classes])]:
        if not Path(path).exists():
            key = "classes" if path == cfg.classes else "check_images"
            raise ValueError(f"{key}={path}: there is no such file")
    to, out = target(cfg)
    if to != "onnx" and any(override.startswith("opset=") for override in typed):
        raise ValueError(f"opset={cfg.opset} is of ONNX: leave it out with to={to}")
    if cfg.int8 is not None:
        if cfg.opset < 13:
            raise ValueError(f"opset={cfg.opset}: int8 has a scale per channel, which ONNX has from opset=13 on")
        require_int8(cfg.int8, cfg.quantizer.method, method_key="quantizer.method")
        if (cfg.int8, to, cfg.form) != ("onnxruntime", "onnx", "deploy"):
            raise ValueError(
                f"int8={cfg.int8} to={to} form={cfg.form}: a file in int8 is the deploy form in ONNX. Choose "
                "int8=onnxruntime to=onnx form=deploy"
            )
    return to, out


def check_paths(cfg: DictConfig) -> list[str]:
    """The image files and folders that are named."""
    named = cfg.check_images
    return [] if named is None else [str(path) for path in (named if isinstance(named, ListConfig) else [named])]


def target(cfg: DictConfig) -> tuple[str, Path]:
    """Format and file."""
    formats = {suffix: name for name, suffix in SUFFIXES.items()}
    to = cfg.to or (formats.get(Path(cfg.out).suffix) if cfg.out is not None else "onnx")
    if to not in SUFFIXES:
        chosen = f"to={cfg.to}" if cfg.to else f"out={cfg.out}"
        raise ValueError(f"{chosen}: choose to=onnx or to=pt2, and a file that ends so")
    out = Path(cfg.ckpt).with_suffix(SUFFIXES[to]) if cfg.out is None else Path(cfg.out)
    if out.suffix != SUFFIXES[to]:
        raise ValueError(f"out={out}: with to={to} it ends in {SUFFIXES[to]}")
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: {out.parent} is no directory")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"out={out} cannot be written: name another file")
    return to, out


def usable_runtimes(cfg: DictConfig, to: str) -> list[str]:
    """What checks files of this format: all that is installed, or what was asked for."""
    from importlib.util import find_spec

    from repvgg.deploy.runtimes import RUNTIMES

    known = RUNTIMES[SUFFIXES[to]]
    if cfg.runtimes is None:
        wanted = [runtime for runtime in known if find_spec(runtime) is not None] or [known[0]]
    else:
        wanted = list(cfg.runtimes) if isinstance(cfg.runtimes, ListConfig) else [str(cfg.runtimes)]
    if not wanted or not set(wanted) <= set(known):
        raise ValueError(f"runtimes={wanted}: with to={to} choose from {', '.join(known)}")
    missing = [package for package in (*WRITERS[to], *wanted) if find_spec(package) is None]
    if missing:
        raise ValueError(f"to={to} needs {', '.join(missing)}, which this Python lacks: pip install -e '.[deploy]'")
    return wanted


def classes_of(cfg: DictConfig, weights: "Weights") -> list[str] | None:
    """Names of the classes, where something says them: what was typed, the checkpoint, the data."""
    count, own = weights.num_classes, weights.class_words or weights.classes
    names, source = own, f"{cfg.ckpt}"
    if cfg.classes is not None:
        source = f"classes={cfg.classes}"
        try:  # some editors begin a text with a byte-order mark
            lines = Path(cfg.classes).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"classes={cfg.classes} cannot be read as text: {error}") from error
        names = [line.strip() for line in lines if line.strip()]
    elif own is None and Path(cfg.data.val_file).is_file():
        manifest = read_manifest(cfg.data.val_file)
        names, source = manifest.class_words or manifest.classes, f"data={cfg.data.name} ({cfg.data.val_file})"
    if names is not None and len(names) != count:
        raise ValueError(
            f"{source} names {len(names)} classes, the checkpoint has {count}. Choose data= and data.dir= of its "
            "training, or classes=FILE with check_images=PATH or check=random"
        )
    # Other words for a class are the user's to choose; a name that the checkpoint has for another class is a mistake.
    for known in filter(None, (weights.classes, weights.class_words)):
        for at, (name, theirs) in enumerate(zip(names or (), known, strict=True)):
            if name != theirs and name in known:
                raise ValueError(
                    f"{source} calls class {at} {name}, which is class {known.index(name)} of {cfg.ckpt}; its class "
                    f"{at} is {theirs}. Put them in the checkpoint's order, or leave classes= out: it has the names"
                )
    return names


def images_of(cfg: DictConfig, preprocessing: "Preprocessing", weights: "Weights") -> tuple["list[Tensor]", str]:
    """Batches of pixels, uint8 N × 3 × H × W, and what they are."""
    import numpy as np
    import torch

    size = preprocessing.crop
    if cfg.check == "random":
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(
            0, 256, (cfg.images, cfg.net.in_channels, size, size), generator=generator, dtype=torch.uint8
        )
        return list(pixels.split(BATCH)), f"{cfg.images} images of random pixels, not of real images"
    if cfg.check_images is not None:
        from repvgg.data.pictures import find_images, open_image

        found = find_images(check_paths(cfg))
        if found.unreadable:
            raise ValueError(f"check_images: {found.unreadable[0]}")
        files = found.files[: cfg.images]
        crops = np.stack([preprocessing.cut(open_image(file)) for file in files])
        pixels = torch.from_numpy(crops).permute(0, 3, 1, 2)
        return list(pixels.split(BATCH)), f"{len(files)} images of {', '.join(check_paths(cfg))}"

    from hydra.utils import instantiate

    from repvgg.checkpoints import require_same_classes
    from repvgg.data.loader import make_loader

    if cfg.data.prepare is not None:
        instantiate(cfg.data.prepare)()
    try:
        require_files({"val": cfg.data.val_file}, cfg.data.write_command)
    except DatasetMissingError as error:
        raise ValueError(
            f"{error}\nor check the file with check_images=PATH, images of your own, or with check=random, no images"
        ) from error
    manifest = read_manifest(cfg.data.val_file)
    require_same_classes(weights, manifest, cfg.data)
    samples = manifest.samples
    records = np.unique(np.linspace(0, samples - 1, min(cfg.images, samples)).astype(int)).tolist()
    loader = make_loader(
        cfg.data.val_file,
        transform=instantiate(cfg.data.val_transform),
        batch_size=min(BATCH, len(records)),
        train=False,
        records=records,
        num_threads=cfg.data.num_threads,
    )
    # Copies: the loader's tensors are slots of a ring.
    batches = [images.clone() for images, _ in loader]
    return batches, f"{len(records)} validation images of {cfg.data.val_file}"


def quantize_file(cfg: DictConfig, file: Path, preprocessing: "Preprocessing") -> str:
    """Put the int8 form in the place of an ONNX file; says with what it was calibrated."""
    import torch
    from hydra.utils import instantiate

    from repvgg.data.sample import BATCH, drawn_images
    from repvgg.deploy.int8 import quantize_onnx

    chosen = cfg.quantizer
    if not Path(chosen.file).is_file():
        raise ValueError(
            f"int8={cfg.int8} calibrates with training images, and there is no {chosen.file}. Write it with\n"
            f"  {suggested(cfg.data.write_command, cfg.data.dir)}\nor give another .beton file: quantizer.file=PATH"
        )
    pixels = drawn_images(
        chosen.file,
        transform=instantiate(cfg.data.val_transform),
        images=chosen.images,
        seed=chosen.seed,
        key="quantizer.images",
        num_threads=cfg.data.num_threads,
    ).float()
    if not preprocessing.inside:
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        pixels = (pixels - mean) / std
    said = f"{chosen.method or 'minmax'}, {chosen.images} images of {chosen.file}"
    quantize_onnx(
        file,
        file,
        pixels.split(BATCH),
        method=chosen.method,
        per_channel=chosen.per_channel,
        metadata={"int8": f"{chosen.method or 'minmax'}, {chosen.images} calibration images"},
    )
    return said


def described(
    cfg: DictConfig, network: "Network", preprocessing: "Preprocessing", names: list[str] | None
) -> dict[str, str]:
    """The file's metadata."""
    import hashlib

    with Path(cfg.ckpt).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    said = {**network.settled.known, "form": network.form, "checkpoint_sha256": digest}
    if network.weights.name:
        said["checkpoint_weights"] = network.weights.name
    if names is not None:
        said["classes"] = json.dumps(names, ensure_ascii=False)
    return {**said, **preprocessing.metadata()}


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A name that takes the place of ``out`` when the block ends without an error, with the same ending."""
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.tmp{out.suffix}")
    try:
        yield temporary
        temporary.replace(out)
    except OSError as error:
        raise ValueError(f"out={out} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
def main(cfg: DictConfig) -> None:
    """Check, build, write, compare."""
    with clear_errors():
        typed = list(HydraConfig.get().overrides.task)
        to, out = check(cfg)
        runtimes = usable_runtimes(cfg, to)

        # Heavy imports from here on: a wrong command has been answered by now.
        import torch

        from repvgg.checkpoints import load_network, require_three_channels
        from repvgg.deploy.check import check_file
        from repvgg.deploy.export import export_onnx, export_pt2
        from repvgg.deploy.preprocess import Preprocessing

        network = load_network("export", cfg.ckpt, typed, form=cfg.form, precision=torch.float32)
        cfg = network.settled.cfg
        require_three_channels(network.settled)
        for line in filter(None, (network.settled.origin, network.weights.taken)):
            print(line)
        crop: Any = cfg.data.val_transform
        preprocessing = Preprocessing.of_validation(
            crop.size, crop.ratio, cfg.data.mean, cfg.data.std, inside=cfg.normalize
        )
        pixels, what = images_of(cfg, preprocessing, network.weights)
        names = classes_of(cfg, network.weights)
        with beside(out) as file:
            write = partial(export_onnx, opset=cfg.opset) if to == "onnx" else export_pt2
            write(
                network.net,
                file,
                input_size=(cfg.net.in_channels, crop.size, crop.size),
                dynamic_size=cfg.dynamic_size,
                metadata=described(cfg, network, preprocessing, names),
                mean=preprocessing.mean if cfg.normalize else None,
                std=preprocessing.std if cfg.normalize else None,
            )
            print(f"Against torch {torch.__version__}, float32, {what}:")
            for line in check_file(
                file,
                network.net,
                pixels,
                preprocessing,
                runtimes,
                tolerance=cfg.tolerance,
                another_size=cfg.dynamic_size,
            ):
                print(f"  {line}", flush=True)
            if cfg.int8 is not None:
                print(f"In int8 ({quantize_file(cfg, file, preprocessing)}):")
                for line in check_file(file, network.net, pixels, preprocessing, runtimes, tolerance=math.inf):
                    print(f"  {line}", flush=True)
            size = file.stat().st_size
        pixels_or_not = "pixels 0 … 255" if cfg.normalize else "normalised pixels"
        version = f", opset {cfg.opset}" if to == "onnx" else ""
        in_int8 = "" if cfg.int8 is None else " in int8"
        side = "height × width" if cfg.dynamic_size else f"{crop.size} × {crop.size}"
        print(
            f"{out}: {network.form} form{in_int8}{version}, {size / 2**20:.1f} MiB; {pixels_or_not}, "
            f"N × {cfg.net.in_channels} × {side}, to logits, N × {cfg.net.num_classes}; "
            f"{'no' if names is None else 'with'} class names"
        )


if __name__ == "__main__":
    prepare_environment()
    sys.argv[1:] = quote_paths(sys.argv[1:], ["ckpt", "out", "classes", "check_images"])
    with interruptible("no file is left; the same command begins anew"), answering("export", sys.argv[1:], check):
        main()
