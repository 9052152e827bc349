"""A network's tensors as a file under the names of any implementation: the writing half of :data:`NAMINGS`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from repvgg.model.tensorfile import some, write_tensor_file
from repvgg.model.weights import IDENTITY, NAMINGS, OUR_KEY, form_of, kind_names

WHAT_HAS_NAMES = (
    "its networks have a 3×3, a 1×1 and an identity branch, each with a BatchNorm (ablation=full), or are plain "
    "convolutions when deployed. Take form=deploy, where every block becomes one convolution, or naming=ours"
)


def write_weights(net: nn.Module, path: str | Path, *, naming: str = "ours", metadata: Mapping[str, str]) -> None:
    """Write a :class:`RepVGG` or its deploy form, such that the network of that implementation loads it strictly.

    Args:
        net: in the form that the file shall have.
        path: .safetensors, .pth or .pt; what is there is replaced once the new file has been read back.
        naming: a key of :data:`NAMINGS`.
        metadata: what the file says of itself.

    Raises:
        ValueError: another suffix, or tensors that this naming has no names for.
        OSError: see :func:`repvgg.model.tensorfile.write_tensor_file`.
    """
    write_tensor_file(Path(path), named(net, naming), metadata)


def named(net: nn.Module, naming: str) -> dict[str, Tensor]:
    """The tensors of a network under the names of an implementation, in the network's order.

    Raises:
        ValueError: a naming that is not known; tensors that it has no names for; or branches that every block of its
            networks has, and this network's does not.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming={naming}: choose {', '.join(NAMINGS)}")
    table, own = NAMINGS[naming], net.state_dict()
    kinds = kind_names(own)
    theirs = {key: table.written(key, kind) for key, kind in kinds.items()}
    nameless = [key for key, name in theirs.items() if name is None]
    if nameless:
        raise ValueError(
            f"{naming} has no names for {len(nameless)} tensors of this network "
            f"({some(kinds[key] for key in nameless)}): {WHAT_HAS_NAMES}"
        )
    written = {str(theirs[key]): tensor for key, tensor in own.items()}
    missing = [name for key in _expected(kinds.values(), table.parts) if (name := table.theirs(key)) not in written]
    if missing:
        raise ValueError(
            f"{naming} has branches in every block that this network has not ({some(map(str, missing))}), so no "
            f"network of theirs would load the file: {WHAT_HAS_NAMES}"
        )
    return written


def _expected(kinds: Iterable[str], parts: Iterable[str]) -> Iterator[str]:
    """A tensor of every branch that the blocks of a naming's train form have; the first of a stage has no identity."""
    kinds = list(kinds)
    if form_of(kinds) != "train":
        return
    layers = {(found[1], found[3]) for found in map(OUR_KEY.fullmatch, kinds) if found is not None}
    for layer, block in sorted(layers, key=lambda place: place[0]):
        for part in parts:
            if part.startswith("branches.") and (part != IDENTITY or block not in (None, "0")):
                yield f"{layer}.{part}.weight"
