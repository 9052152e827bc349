"""Files of named tensors and of what they say of themselves: torch's own format, and safetensors.

No code in a file is run. What is written is read back before it gets its name.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from repvgg.files import replacing

#: The formats that are written, by the suffix of the file.
SUFFIXES = (".safetensors", ".pth", ".pt")
#: Under this key a checkpoint of a training says its choices of the config groups (repvgg.learn.checkpoint).
RUN = "repvgg_run"
#: There too it says what its classes are called, and in words where these are codes; in metadata the lists are JSON.
CLASS_NAMES = ("classes", "class_words")

#: Parts of the names that averaged weights have: timm's ``state_dict_ema``, torchvision's ``model_ema``, ``ema_model``.
AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)", re.IGNORECASE)
#: How deep in a file's mappings a network is looked for.
DEPTH = 3


class TensorFile(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        state: tensors by their names.
        metadata: what it says of itself.
        name: of ``state`` in a file with several networks; empty for one with a single one.
        taken: in words which of several networks ``state`` is; empty likewise.
    """

    state: dict[str, Tensor]
    metadata: dict[str, str]
    name: str = ""
    taken: str = ""


def read_tensor_file(path: Path, which: str | None = None) -> TensorFile:
    """The tensors of a checkpoint file, and its metadata.

    The tensors may lie under a name, such as ``state_dict`` or ``model``. Of a Lightning checkpoint they are the
    network's, and the metadata its choices of the config groups and its classes. A safetensors file is known by its
    content, whatever its name.

    Args:
        which: of several networks, ``ema`` for averaged weights, ``raw`` for the others, or their name in the file;
            None for the averaged ones where there are some.

    Raises:
        ValueError: no such file, none of tensors alone, or not a whole one; several networks and no way to tell which
            is meant; or none that is ``which``.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path.absolute()}")
    if path.suffix == ".safetensors" or _looks_like_safetensors(path):
        tensors, metadata = _read_safetensors(path)
        content: object = tensors
        lightning = False
    else:
        content = _torch_load(path)
        metadata = _metadata(content)
        lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no named tensors, but {type(content).__name__}: save a model's state_dict()")
    found = list(_networks(content))
    if not found:
        raise ValueError(
            f"{path} holds no tensors of a network under state_dict or model; it has {some(map(str, content))}"
        )
    if lightning:  # beside its network a LightningModule may keep other state, of a loss or a metric
        found = [n._replace(state={k: t for k, t in n.state.items() if k.startswith("net.")} or n.state) for n in found]
    taken, others = _chosen(path, found, which)
    if not others:
        return TensorFile(taken.state, metadata)
    names = " and ".join(map(str, others))
    return TensorFile(
        taken.state, metadata, taken.name, f"{taken} is taken, not {names}; weights=ema or weights=raw chooses"
    )


def write_tensor_file(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata in the format of the suffix; the same input gives the same bytes.

    A `.pth` or `.pt` holds ``{"state_dict": …, "metadata": …}``, which ``torch.load(weights_only=True)`` reads. The
    file is read back and compared before it takes the place of ``path``.

    Raises:
        ValueError: another suffix than :data:`SUFFIXES`.
        OSError: the disk is full, say, or gives back other bytes.
    """
    require_suffix(path)
    # A tensor may be a view into a larger storage or a mapped file, and lie in another memory format.
    own = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    metadata = {str(key): str(value) for key, value in metadata.items()}  # torch's version is of a class of its own
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            _write_safetensors(file, own, metadata)
        else:
            whole = {key: tensor.clone() if _is_part(tensor) else tensor for key, tensor in own.items()}
            torch.save({"state_dict": whole, "metadata": metadata}, file)
        file.flush()
        read, said, *_ = read_tensor_file(Path(file.name))
        different = [key for key in own.keys() | read.keys() if not _same(own.get(key), read.get(key))]
        if different or said != metadata:
            raise OSError(f"{path}: what was written reads back differently ({some(different) or 'metadata'})")


def require_suffix(path: Path) -> None:
    """Raise ValueError unless a file of this name can be written."""
    if path.suffix not in SUFFIXES:
        ending = f"ends in {path.suffix}" if path.suffix else "has no suffix"
        raise ValueError(f"{path} {ending}: name a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, as the format is")


def some(names: Iterable[str], count: int = 3) -> str:
    """The first of a list of names."""
    names = list(names)
    return ", ".join(names[:count]) + (" …" if len(names) > count else "")


# --- torch's format -------------------------------------------------------------------------------------------------


def _torch_load(path: Path) -> object:
    try:
        # Files from before torch 1.6 are no zip files and cannot be mapped.
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of timm's and others' trainings
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged pickle makes the reader stumble over
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a Python object, {found[1]}" if found else (str(error) or "it ends early").splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as tensors alone ({reason}). Either it is no whole checkpoint, or it needs code to "
            "be run, which a file from elsewhere is not trusted with here. Where you trust it, keep its tensors only, "
            "averaged weights included: content = torch.load(PATH, weights_only=False); torch.save({key: content[key] "
            "for key in ('state_dict', 'state_dict_ema', 'model', 'model_ema') if key in content}, NEW_PATH)"
        ) from error


def _metadata(content: object) -> dict[str, str]:
    """Return the metadata of a file that was written here, or the choices and classes of a training's checkpoint."""
    if not isinstance(content, Mapping):
        return {}
    said, run = content.get("metadata"), content.get(RUN)
    if said is None and isinstance(run, Mapping):
        choices = run.get("choices")
        names = {key: json.dumps(run[key], ensure_ascii=False, default=str) for key in CLASS_NAMES if key in run}
        said = {**(choices if isinstance(choices, Mapping) else {}), **names}
    if not isinstance(said, Mapping):
        return {}
    return {key: value for key, value in said.items() if isinstance(key, str) and isinstance(value, str)}


class _Network(NamedTuple):
    """The tensors of one network in a file; none where they have no names of their own."""

    name: str
    averaged: bool
    state: dict[str, Tensor]

    @property
    def tensor_names(self) -> set[str]:
        return set(without_prefixes(self.state))

    def __str__(self) -> str:
        return f"{self.name or 'tensors'}{' (averaged weights)' if self.averaged else ''}"


def _networks(content: Mapping[Any, Any], path: str = "", depth: int = DEPTH) -> Iterator[_Network]:
    """Every mapping of named tensors in a file."""
    if all(isinstance(value, Tensor) for value in content.values()):
        state = {str(key): tensor for key, tensor in content.items()}
        if path in ("", "state_dict", "model") or _has_weights(state):
            yield from _parts(state, path)
        return
    found: list[_Network] = []
    for key, value in content.items():
        name = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str) or key.startswith("optim"):
            continue
        if isinstance(value, Mapping) and value and depth:
            found += _networks(value, name, depth - 1)
        elif isinstance(value, list | tuple) and AVERAGED.search(name) and any(map(_is_kernel, value)):
            found.append(_Network(name, True, {}))
    names = {network.name.rpartition(".")[2] for network in found}
    # Lightning's WeightAveraging, and mmengine's EMAHook, put the averages in the place of the weights.
    swapped = {"current_model_state"} & names
    if isinstance(ema := content.get("ema_state_dict"), Mapping) and "steps" in ema:
        swapped |= {"ema_state_dict"}
    if swapped and "state_dict" in names:
        averaged_of = {"state_dict": True, **dict.fromkeys(swapped, False)}
        found = [n._replace(averaged=averaged_of.get(n.name.rpartition(".")[2], n.averaged)) for n in found]
    yield from found


def _parts(state: dict[str, Tensor], path: str) -> Iterator[_Network]:
    """A flat mapping is one network, or also the averaged copy that a module keeps under a name of its own."""
    firsts = dict.fromkeys(key.partition(".")[0] for key in state)
    copies = {first: _below(first, state) for first in firsts if AVERAGED.search(first)}
    copies = {first: copy for first, copy in copies.items() if _has_weights(copy)}
    rest = {key: tensor for key, tensor in state.items() if key.partition(".")[0] not in copies}
    for name, part in {path: rest, **{f"{path}.{first}".lstrip("."): copy for first, copy in copies.items()}}.items():
        # torch's AveragedModel, and mmengine's, count their updates.
        counters = {
            key for key in ("n_averaged", "steps") if key in part and any(k.startswith("module.") for k in part)
        }
        averaged = AVERAGED.search(name) is not None or bool(counters)
        if part:
            yield _Network(name, averaged, {key: tensor for key, tensor in part.items() if key not in counters})


def _chosen(path: Path, found: Sequence[_Network], which: str | None) -> tuple[_Network, list[_Network]]:
    """The network to take, and the others of its kind."""
    known = max(found, key=lambda network: len(network.state)).tensor_names
    # A loss or a discriminator beside it has tensors of other names.
    rivals = [n for n in found if not n.state or 2 * len(n.tensor_names & known) > len(n.state)]
    averaged, raw = ([n for n in rivals if n.averaged == wanted] for wanted in (True, False))
    if which is None:
        fitting = averaged or raw
    else:
        fitting = {"ema": averaged, "raw": raw}.get(which) or [n for n in rivals if n.name == which]
    held = " and ".join(map(str, rivals))
    if not fitting:
        raise ValueError(f"weights={which}: {path} holds {held}, and nothing else. Leave weights= out")
    if len(fitting) > 1:
        choices = " or ".join(f"weights={n.name}" for n in fitting)
        raise ValueError(f"{path} holds {held}, and nothing says which is meant: give {choices}")
    (taken,) = fitting
    if not taken.state:
        raise ValueError(f"{path} holds {held}: the tensors of {taken.name} have no names. Give weights=raw")
    return taken, [n for n in rivals if n is not taken]


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DDP, torch.compile, AveragedModel and LightningModules put before all names."""
    state = {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}
    while True:
        prefix = next(iter(state), "").partition(".")[0] + "."
        if prefix not in ("module.", "net.", "model.") or not all(key.startswith(prefix) for key in state):
            return state
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _below(first: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{first}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _has_weights(state: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(".weight") and _is_kernel(tensor) for key, tensor in state.items())


def _is_kernel(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Value for value: a NaN equals itself here."""
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


# --- safetensors ----------------------------------------------------------------------------------------------------


def _looks_like_safetensors(path: Path) -> bool:
    """Eight bytes that say how long the JSON after them is."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}). Copy or write it again; a file of torch's own format is "
            "named .pth, .pt or .ckpt"
        ) from error


def _write_safetensors(file: BinaryIO, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save

    # The package copies what shares memory only if asked to, and orders the metadata anew in every process.
    content = memoryview(save({key: tensor.clone() if _is_part(tensor) else tensor for key, tensor in state.items()}))
    length = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(bytes(content[8 : 8 + length]))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    file.write(content[8 + length :])
