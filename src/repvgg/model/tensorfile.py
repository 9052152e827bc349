"""Files of named tensors and of what they say of themselves: torch's own format, and safetensors.

No code in a file is run. What is written is read back before it gets its name.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from repvgg.files import replacing

#: The formats that are written, by the suffix of the file.
SUFFIXES = (".safetensors", ".pth", ".pt")
#: Under this key a checkpoint of a training says its choices of the config groups (repvgg.learn.checkpoint).
RUN = "repvgg_run"


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint file, and its metadata.

    The tensors may lie under ``state_dict`` or ``model``. Of a Lightning checkpoint they are the network's, and the
    metadata its choices of the config groups. A safetensors file is known by its content, whatever its name.

    Raises:
        ValueError: no such file, none of tensors alone, or not a whole one.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path.absolute()}")
    if path.suffix == ".safetensors" or _looks_like_safetensors(path):
        state, metadata = _read_safetensors(path)
        return _require_tensors(path, state), metadata
    content: Any = _torch_load(path)
    lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    metadata = _metadata(content)
    while isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in ("state_dict", "model") if key in content), None)
        if inner is None:
            raise ValueError(f"{path} holds no tensors under state_dict or model; it has {some(map(str, content))}")
        content = inner
    state = _require_tensors(path, content)
    # Beside its network a LightningModule may keep other state, of a loss or a metric.
    network = {key: tensor for key, tensor in state.items() if key.startswith("net.")}
    return (network if lightning and network else state), metadata


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
        read, said = read_tensor_file(Path(file.name))
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
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged pickle makes the reader stumble over
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a Python object, {found[1]}" if found else (str(error) or "it ends early").splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as tensors alone ({reason}). Either it is no whole checkpoint, or it needs code to "
            "be run, which a file from elsewhere is not trusted with here. Where you trust it, keep its tensors only: "
            "torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW_PATH)"
        ) from error


def _metadata(content: object) -> dict[str, str]:
    """Of a file that was written here, or the choices of a training's checkpoint."""
    if not isinstance(content, Mapping):
        return {}
    said = content.get("metadata")
    if said is None:
        run = content.get(RUN)
        said = run.get("choices") if isinstance(run, Mapping) else None
    if not isinstance(said, Mapping):
        return {}
    return {key: value for key, value in said.items() if isinstance(key, str) and isinstance(value, str)}


def _require_tensors(path: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no named tensors, but {type(content).__name__}: save a model's state_dict()")
    return {str(key): tensor for key, tensor in content.items()}


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
