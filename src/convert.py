"""A checkpoint in another form, under other names, in another format: `python src/convert.py --help` has examples."""

import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from repvgg.checkpoints import Network, load_network, metadata_of
from repvgg.cli import (
    clear_errors,
    interruptible,
    prepare_environment,
    quote_paths,
    require_checkpoint,
    typed_of,
)
from repvgg.command import answering

if TYPE_CHECKING:
    from torch import dtype, nn

#: What a conversion reads of train.yaml; the rest of it is of a training.
OF_NETWORK = ("model", "ablation", "data", "net", "block")
OWN = ("ckpt", "weights", "out", "form", "naming", "fold_dtype", "check", "overwrite", "hydra", "root")
#: Random images on which both forms are compared: every design of the repository takes this size.
IMAGES, PIXELS, SEED = 4, 64, 0


def check(cfg: DictConfig) -> None:
    """Raise ValueError for what is wrong with a command, before anything heavy is imported."""
    typed = list(HydraConfig.get().overrides.task)
    read = typed_of(typed, (*OF_NETWORK, *OWN))
    if ignored := [override for override in typed if override not in read]:
        raise ValueError(f"{' '.join(ignored)}: a conversion reads only {', '.join(OF_NETWORK)} of train.py")
    require_checkpoint(cfg.ckpt, "convert", "out=FILE")
    if cfg.out is not None:
        check_out(Path(cfg.out), Path(cfg.ckpt), cfg.overwrite)


def check_out(out: Path, ckpt: Path, overwrite: bool) -> None:
    """Raise ValueError unless a file can be written there."""
    if out.is_dir():
        example = out / f"{ckpt.stem}-deploy.safetensors"
        raise ValueError(f"out={out} is a directory: name the file, as in out={example}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={out}: there is no directory {out.absolute().parent}")
    if out.exists() and out.samefile(ckpt):
        raise ValueError(f"out={out} is ckpt itself: give the new file another name")
    if out.exists() and not overwrite:
        raise ValueError(f"out={out} is there already: name another file, or add overwrite=true to replace it")


@hydra.main(version_base="1.3", config_path="../conf", config_name="convert")
def main(cfg: DictConfig) -> None:
    """Check, then write, or show what is there."""
    with clear_errors():
        typed = list(HydraConfig.get().overrides.task)
        check(cfg)

        # Heavy imports from here on: most wrong commands have been answered by now.
        import torch

        from repvgg.model import NAMINGS, require_suffix

        if cfg.naming not in NAMINGS:
            raise ValueError(f"naming={cfg.naming}: choose {', '.join(NAMINGS)}")
        if cfg.out is not None:
            require_suffix(Path(cfg.out))
        fold_dtype = getattr(torch, cfg.fold_dtype)
        network = load_network("convert", cfg.ckpt, typed, form=cfg.form, fold_dtype=fold_dtype)
        if cfg.out is None:
            show(network)
        else:
            convert(network, Path(cfg.out), naming=cfg.naming, fold_dtype=fold_dtype, check=cfg.check)


def convert(network: Network, out: Path, *, naming: str, fold_dtype: "dtype", check: bool) -> None:
    """Write the network, and say what was written."""
    from repvgg.model import count_parameters, damage, named, write_weights
    from repvgg.model.tensorfile import CLASS_NAMES

    weights = network.weights
    named(network.net, naming)  # whether there are names, before anything takes long
    metadata = {
        "form": network.form,
        "naming": naming,
        **metadata_of(network.settled),
        "num_classes": str(network.settled.cfg.net.num_classes),
        **{key: weights.metadata[key] for key in CLASS_NAMES if key in weights.metadata},
        "source": weights.path.name,
        **({"source_weights": weights.name} if weights.name else {}),
        "source_sha256": sha256(weights.path),
    }
    if check and (found := damage(weights)):
        raise ValueError(f"{weights.path} is damaged: {'; '.join(found)}. check=false converts it all the same")
    if network.train_form is not None:
        metadata["fold_dtype"] = str(fold_dtype).removeprefix("torch.")
        if check:
            metadata |= compare(network, fold_dtype)
    else:  # of the same tensors, where whoever folded them said it
        metadata |= {key: value for key, value in weights.metadata.items() if key in (*EQUIVALENCES, "fold_dtype")}
    write_weights(network.net, out, naming=naming, metadata={**metadata, **versions()})

    for line in filter(None, (network.settled.origin, weights.taken)):
        print(line)
    print(
        f"{out}: {network.form} form, {naming} naming, {subject(network)}, {metadata['num_classes']} classes, "
        f"{count_parameters(network.net) / 1e6:.2f} M parameters, {out.stat().st_size / 1e6:.1f} MB"
    )
    for key in EQUIVALENCES:
        if key in metadata:
            print(f"  {in_words(metadata[key])}")


EQUIVALENCES = ("equivalence_float64", "equivalence_float32")


def compare(network: Network, fold_dtype: "dtype") -> dict[str, str]:
    """How far both forms are apart on random images, as JSON; ValueError where that is more than rounding."""
    import torch

    from repvgg.model import NotAffineError, equivalence, to_deploy

    train = network.train_form
    assert train is not None
    try:
        deploy = network.net if network.form == "deploy" else to_deploy(train, fold_dtype=fold_dtype)
    except NotAffineError:  # a design of one's own that has no deploy form: there is nothing to compare
        return {}
    channels = network.settled.cfg.net.in_channels
    x = torch.randn(IMAGES, channels, PIXELS, PIXELS, generator=torch.Generator().manual_seed(SEED))
    said = {}
    for key, dtype in zip(EQUIVALENCES, (torch.float64, torch.float32), strict=True):
        found = equivalence(train, deploy, x, dtype=dtype)
        # In float64 what is left is the rounding of the deployed weights.
        allowed = torch.finfo(precision(deploy)).eps ** 0.5
        if dtype == torch.float64 and not found.rel_l2 <= allowed:
            raise ValueError(
                f"{network.weights.path}: the two forms differ by {found}, more than the {allowed:.1g} that rounding "
                "may explain: a branch does not fuse as it computes, or these are no weights of a trained network. "
                "check=false converts it all the same"
            )
        numbers = {"max_abs": found.max_abs, "rel_l2": found.rel_l2, "top1_agreement": found.top1_agreement}
        of = {"dtype": found.dtype, "images": IMAGES, "pixels": PIXELS, "seed": SEED}
        said[key] = json.dumps({name: float(f"{value:.3g}") for name, value in numbers.items()} | of)
    return said


def precision(net: "nn.Module") -> "dtype":
    """The coarsest of a network's parameters."""
    import torch

    return max({parameter.dtype for parameter in net.parameters()}, key=lambda dtype: torch.finfo(dtype).eps)


def in_words(equivalence: str) -> str:
    """Of the metadata's JSON."""
    found = json.loads(equivalence)
    return (
        f"train and deploy form on {found['images']} random images of {found['pixels']} px in {found['dtype']}: "
        f"max |Δlogit| {found['max_abs']:.3g}, relative L2 {found['rel_l2']:.3g}, "
        f"top-1 agreement {found['top1_agreement']:.2f}"
    )


def subject(network: Network) -> str:
    """The network's choices, as they are typed."""
    known = network.settled.known
    ablation = f"ablation={known['ablation']}" if "ablation" in known else "(a deploy form of any ablation)"
    return f"model={known['model']} {ablation}"


def versions() -> dict[str, str]:
    """What wrote the file."""
    import safetensors
    import torch

    from repvgg.git import git_sha

    return {"torch": torch.__version__, "safetensors": safetensors.__version__, "git": git_sha()}


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shortened(value: str, characters: int = 200) -> str:
    """A thousand names of classes would fill the screen."""
    return value if len(value) <= characters else f"{value[:characters]} …"


def show(network: Network) -> None:
    """Print what a file is; ValueError in the end where something is wrong with it."""
    from repvgg.model import count_parameters, damage, not_fused, to_deploy
    from repvgg.model.convert import NotAffineError

    weights, net = network.weights, network.net
    print(f"{weights.path}: {weights.form} form, {weights.naming} naming, {weights.num_classes or 'no'} classes")
    parameters = f"{count_parameters(net):,}"
    if weights.form == "train":
        try:
            deploy = to_deploy(net)
            parameters += f", deployed {count_parameters(deploy):,}"
            if layers := len(not_fused(deploy)):
                parameters += f" ({layers} layers cannot become one convolution)"
        except NotAffineError as error:
            parameters += f"; it has no deploy form: {error}"
    types = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in net.parameters()}))
    lines = {
        "network": subject(network),
        "": network.settled.origin,
        "weights": weights.taken,
        "layers": weights.architecture,
        "parameters": parameters,
        "tensors": f"{len(weights.state)}, {types}",
        "bytes": f"{weights.path.stat().st_size:,}",
        "sha256": sha256(weights.path),
        **{f"says {key}": shortened(value) for key, value in sorted(weights.metadata.items())},
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        if text:
            print(f"  {name:<{width}}  {text}")
    if found := damage(weights):
        raise ValueError(f"{weights.path} is damaged: {'; '.join(found)}")
    print("All values are finite, all variances positive: it is whole. To convert it:")
    print(f"  python src/convert.py ckpt={weights.path} out=FILE.safetensors form={weights.form} naming=ours")


if __name__ == "__main__":
    prepare_environment()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with clear_errors():
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            raise ValueError("-m: a conversion writes one file; call it once for each")
    sys.argv[1:] = quote_paths(sys.argv[1:], ["ckpt"], new=["out"])
    with (
        interruptible("a file is written whole or not at all; the same command begins anew"),
        answering("convert", sys.argv[1:], check),
    ):
        main()
