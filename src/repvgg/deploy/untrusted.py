"""A `.pt2` file of unknown origin, looked at before torch loads it.

torch.export.load unpickles what a file stores as pickles, evaluates its expressions of sizes as Python, and calls
whatever it names below `torch`. What :func:`repvgg.deploy.export.export_pt2` writes needs none of these freedoms.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Below the archive's root: raw tensors and JSON. Compiled code (AOTInductor), pickled constants and the layouts of
#: older versions are not among them; the example inputs are, since torch reads an empty file for none.
ENTRIES = re.compile(
    r"data/weights/(weight_\d+|\w+_weights_config\.json)|data/constants/(tensor_\d+|\w+_constants_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/[\w.]+|archive_format|archive_version|byteorder"
    r"|version|\.data/\w+"
)
OPERATORS = re.compile(r"torch\.ops\.aten\.\w+(\.\w+)?|_operator\.\w+|torch\.sym_\w+")
#: Expressions of sizes are calls of these on numbers and symbols.
WORDS = re.compile(
    r"Add|Mul|Pow|Max|Min|Mod|FloorDiv|CleanDiv|CeilDiv|PythonMod|Integer|Rational|Symbol|Equality|Unequality"
    r"|(Strict)?(Greater|Less)Than|positive|integer|True|False|[su]\d+"
)


def require_data_only(path: Path) -> None:
    """Refuse a ``.pt2`` whose loading could run what it says.

    Raises:
        ValueError: also for a file that is damaged or no ``.pt2`` of this torch's layout.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            foreign = next((name for name in entries if not ENTRIES.fullmatch(name)), None)
            if foreign is None and entries["data/sample_inputs/model.pt"].file_size:
                foreign = "data/sample_inputs/model.pt"
            documents = {name: json.loads(archive.read(entries[name])) for name in entries if name.endswith(".json")}
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no .pt2 file: {error}. Export it again") from error
    if foreign is not None:
        raise _refused(path, f"an entry {foreign}")
    for name, document in documents.items():
        if not name.startswith("extra/"):
            for key, value in _fields(document):
                _require_harmless(path, key, value)


def _require_harmless(path: Path, key: str, value: Any) -> None:
    if key == "use_pickle" and value:
        raise _refused(path, "pickled tensors")
    if key == "guards_code" and value:
        raise _refused(path, "Python code")
    if key == "target" and isinstance(value, str) and not OPERATORS.fullmatch(value):
        raise _refused(path, f"a call of {value}")
    if key == "expr_str":
        words = re.findall(r"[^\W\d]\w*", str(value))
        if "." in str(value) or not all(map(WORDS.fullmatch, words)):
            raise _refused(path, f"an expression {value}")


def _refused(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} holds {what}, which python src/export.py never writes and which could run any code: it is not loaded"
    )


def _fields(document: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, at any depth."""
    todo = [document]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield from part.items()
            todo += part.values()
        elif isinstance(part, list):
            todo += part
