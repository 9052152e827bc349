"""Class names: what differs is said, and they go with a network from the data to an exported file."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import export
from repvgg.checkpoints import require_same_classes
from repvgg.classes import difference, require_same
from repvgg.data.manifest import Manifest, manifest_path, number_of_classes
from repvgg.model import initialize, read_weights, write_weights
from repvgg.model.tensorfile import RUN
from support.networks import tiny

ABC = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        (ABC, ABC, ""),
        (None, ABC, ""),
        (ABC, None, ""),
        (ABC, ["b", "c", "d"], "only the checkpoint has a; only the data has d"),
        (ABC, ["b", "c"], "only the checkpoint has a"),
        (["b"], ABC, "only the data has a, c"),
        (ABC, ["a", "c", "b"], "the same names in another order, class 1 is b in the checkpoint and c in the data"),
        (["a", "a", "b"], ["a", "b"], "the checkpoint has 3 classes, the data 2 of the same names"),
        (list("abcdefgh"), ["h"], "only the checkpoint has a, b, c, d, e and 2 more"),
        ([], ["a"], "only the data has a"),
    ],
)
def test_a_difference_is_shown(theirs: list[str] | None, ours: list[str] | None, says: str) -> None:
    assert difference(theirs, ours) == says
    if says:
        with pytest.raises(ValueError, match=rf"best\.ckpt is of other classes than val\.beton: {says}\. Do"):
            require_same(theirs, ours, checkpoint="best.ckpt", data="val.beton", then="Do something")
    else:
        require_same(theirs, ours, checkpoint="best.ckpt", data="val.beton", then="Do something")


# --- data -------------------------------------------------------------------------------------------------------------


def manifest(classes: list[str], *, words: list[str] | None = None, adopted: bool = False) -> Manifest:
    return Manifest(1, classes, [1], {} if adopted else {"seed": 0}, "", {}, "", class_words=words)


def test_the_classes_of_an_adopted_file_have_no_names() -> None:
    assert manifest(["0", "1"], adopted=True).names == {}
    assert manifest(["0", "1"]).names == {"classes": ["0", "1"]}
    assert manifest(["n1"], words=["tench"]).names == {"classes": ["n1"], "class_words": ["tench"]}


@pytest.mark.parametrize(
    ("val", "says"), [(["b", "c", "d"], "only .*train.beton has a; only .*val.beton has d"), (["b", "a", "c"], "order")]
)
def test_training_and_validation_files_of_other_classes_are_refused(val: list[str], says: str, tmp_path: Path) -> None:
    files = {"train": tmp_path / "train.beton", "val": tmp_path / "val.beton"}
    manifest(ABC).write(manifest_path(files["train"]))
    manifest(val).write(manifest_path(files["val"]))
    with pytest.raises(ValueError, match=f"The data files have different classes: .*{says}"):
        number_of_classes(files, 3)
    manifest(val, adopted=True).write(manifest_path(files["val"]))
    assert number_of_classes(files, 3) == 3, "another writer's file says no names"


# --- from the checkpoint on -------------------------------------------------------------------------------------------


def checkpoint(path: Path, **names: object) -> Path:
    """As a training on three classes leaves it."""
    net = tiny(num_classes=3)
    state = {f"net.{key}": tensor for key, tensor in net.state_dict().items()}
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": state, RUN: {"choices": {}, **names}}, path)
    return path


def test_names_are_read_from_a_checkpoint_and_from_what_was_written_of_it(tmp_path: Path) -> None:
    weights = read_weights(checkpoint(tmp_path / "best.ckpt", classes=ABC, class_words=["ä", "ß", "é"]))
    assert (weights.classes, weights.class_words) == (ABC, ["ä", "ß", "é"])
    for suffix in (".safetensors", ".pth"):
        write_weights(tiny(num_classes=3), tmp_path / f"net{suffix}", metadata=weights.metadata)
        again = read_weights(tmp_path / f"net{suffix}")
        assert (again.classes, again.class_words) == (ABC, ["ä", "ß", "é"])


@pytest.mark.parametrize("classes", [["a", "b"], "abc", [1, 2, 3], {"a": 1}, torch.zeros(3), None, 3])
def test_names_that_do_not_fit_the_network_are_none(classes: object, tmp_path: Path) -> None:
    assert read_weights(checkpoint(tmp_path / "best.ckpt", classes=classes)).classes is None
    assert read_weights(checkpoint(tmp_path / "old.ckpt")).classes is None


def test_other_classes_are_refused(tmp_path: Path) -> None:
    weights = read_weights(checkpoint(tmp_path / "best.ckpt", classes=ABC))
    data = OmegaConf.create({"val_file": "val.beton"})
    require_same_classes(weights, manifest(ABC), data)
    require_same_classes(weights, manifest(["0", "1", "2"], adopted=True), data)
    for other, says in ((["b", "c", "d"], "only the checkpoint has a"), (["c", "b", "a"], "another order")):
        with pytest.raises(ValueError, match=rf"best\.ckpt is of other classes than val\.beton: .*{says}.*data\.dir="):
            require_same_classes(weights, manifest(other), data)


def test_a_classifier_of_other_classes_is_not_kept(tmp_path: Path) -> None:
    """As many as the file's, but not these: a fine-tuning begins with a fresh one and says so."""
    weights = read_weights(checkpoint(tmp_path / "best.ckpt", classes=ABC))
    for classes, kept in ((ABC, True), (None, True), (["b", "c", "d"], False), (["a", "c", "b"], False)):
        net = tiny(num_classes=3)
        fresh = net.head.weight.clone()
        said = initialize(net, weights, classes)
        assert torch.equal(net.head.weight, weights.state["head.weight"] if kept else fresh), classes
        assert ("its classifier of 3 classes too" in said) == kept
        assert ("the classifier is fresh, since the file's is of other classes: " in said) != kept
    assert "only the file has a; only the data has d" in initialize(tiny(num_classes=3), weights, ["b", "c", "d"])


# --- in an exported file ----------------------------------------------------------------------------------------------


def exported_names(ckpt: Path, directory: Path, text: bytes | None = None) -> list[str] | None:
    classes = None
    if text is not None:
        classes = directory / "classes.txt"
        classes.write_bytes(text)
    data = {"name": "folder", "val_file": str(directory / "val.beton")}
    cfg = OmegaConf.create({"ckpt": str(ckpt), "classes": classes and str(classes), "data": data})
    return export.classes_of(cfg, read_weights(ckpt))


def test_an_exported_file_has_the_checkpoints_names(tmp_path: Path) -> None:
    """And not those of whatever data lies where the configuration says."""
    (tmp_path / "val.beton").touch()
    manifest(["b", "c", "d"]).write(manifest_path(tmp_path / "val.beton"))
    assert exported_names(checkpoint(tmp_path / "best.ckpt", classes=ABC), tmp_path) == ABC
    words = ["tench", "goldfish", "shark"]
    assert exported_names(checkpoint(tmp_path / "best.ckpt", classes=ABC, class_words=words), tmp_path) == words
    assert exported_names(checkpoint(tmp_path / "old.ckpt"), tmp_path) == ["b", "c", "d"], "nothing else says any"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_text_file_of_names_may_begin_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    ckpt = checkpoint(tmp_path / "best.ckpt", classes=ABC)
    for names in (ABC, ["Äpfel", "Birnen", "Kirschen"], ["a", "Birnen", "c"]):
        assert exported_names(ckpt, tmp_path, "\r\n".join(names).encode(encoding)) == names


def test_names_in_another_order_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    ckpt = checkpoint(tmp_path / "best.ckpt", classes=["n1", "n2", "n3"], class_words=["crane", "tench", "crane"])
    assert exported_names(ckpt, tmp_path, b"crane\ntench\ncrane\n") == ["crane", "tench", "crane"]
    for text, says in (
        (b"n1\nn3\nn2\n", "calls class 1 n3, which is class 2 of .*its class 1 is n2"),
        (b"tench\nx\ny\n", "calls class 0 tench, which is class 1"),
        (b"a\nb\n", "names 2 classes, the checkpoint has 3"),
    ):
        with pytest.raises(ValueError, match=says):
            exported_names(ckpt, tmp_path, text)
