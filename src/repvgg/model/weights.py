"""Weights from anywhere: this repository's checkpoints, the authors' files, timm's and mmpretrain's.

A published naming is a table of patterns that reads in both directions. In between stand this repository's names with
a branch's kind in the place of its number, such as ``stages.0.1.branches.3x3.conv.weight``: a file does not depend on
the order in which an ablation lists its branches. What kind a branch is, its tensors say.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from repvgg.classes import difference
from repvgg.model.tensorfile import read_tensor_file, some, without_prefixes

Form = Literal["train", "deploy"]
Head = Literal["keep", "fresh"]

#: A block of our naming (a residual stage's projection, too), a part of it, and the tensor.
OUR_KEY = re.compile(r"(stem|stages\.(\d+)\.(\d+|shortcut))\.((?:branches|parts|conv|se|norm)(?:\..+)?)\.(\w+)")
#: The parts of a block whose names every implementation has its own of.
CONV3, BN3, CONV1, BN1 = "branches.3x3.conv", "branches.3x3.bn", "branches.1x1.conv", "branches.1x1.bn"
IDENTITY, FUSED, SE_DOWN, SE_UP = "branches.identity.bn", "conv", "se.down", "se.up"
#: Of a BatchNorm. Nothing is computed from it, and not all files have it.
COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class Naming:
    """How one implementation calls the tensors of a RepVGG.

    Attributes:
        stem: stage 0.
        block: block ``{block}``, from 0, of stage ``{stage}``.
        first_stage: the ``{stage}`` of the paper's stage 1.
        head: the classifier.
        parts: of a block, our names and theirs.
    """

    stem: str
    block: str
    first_stage: int
    head: str
    parts: Mapping[str, str]

    def theirs(self, ours: str) -> str | None:
        """Their key of one of ours; None where they have none."""
        if ours.startswith("head."):
            return f"{self.head}.{ours.removeprefix('head.')}"
        found = OUR_KEY.fullmatch(ours)
        if found is None or found[3] == "shortcut" or found[4] not in self.parts:
            return None
        layer = self.stem
        if found[1] != "stem":
            layer = self.block.format(stage=int(found[2]) + self.first_stage, block=found[3])
        return f"{layer}.{self.parts[found[4]]}.{found[5]}"

    def written(self, own: str, kind: str) -> str | None:
        """Their key of a tensor that a network here has under ``own``, and with its branch's kind under ``kind``."""
        return self.theirs(kind)

    def ours(self, theirs: str) -> str | None:
        """Our key of one of theirs; None for a key that this naming does not have."""
        path, _, leaf = theirs.rpartition(".")
        if path == self.head:
            return f"head.{leaf}"
        layers = re.escape(self.block).replace(r"\{stage\}", r"(\d+)").replace(r"\{block\}", r"(\d+)")
        parts = "|".join(re.escape(part) for part in self.parts.values())
        found = re.fullmatch(rf"(?:{re.escape(self.stem)}|{layers})\.({parts})", path)
        if found is None:
            return None
        stage, block, part = found.groups()
        ours = next(name for name, their_part in self.parts.items() if their_part == part)
        layer = "stem" if stage is None else f"stages.{int(stage) - self.first_stage}.{block}"
        return f"{layer}.{ours}.{leaf}"


class _Ours(Naming):
    """This repository's names: a design may have branches of any kind."""

    def theirs(self, ours: str) -> str | None:
        return ours

    def written(self, own: str, kind: str) -> str | None:
        return own  # with the branches' numbers, so that the network that it was written from loads it as it is

    def ours(self, theirs: str) -> str | None:
        return theirs if OUR_KEY.fullmatch(theirs) or re.fullmatch(r"head\.\w+", theirs) else None


#: ``official`` is the authors' repository, timm's is ``byobnet``.
NAMINGS: Mapping[str, Naming] = {
    "ours": _Ours("stem", "stages.{stage}.{block}", 0, "head", {}),
    "official": Naming(
        stem="stage0",
        block="stage{stage}.{block}",
        first_stage=1,
        head="linear",
        parts={
            **{CONV3: "rbr_dense.conv", BN3: "rbr_dense.bn", CONV1: "rbr_1x1.conv", BN1: "rbr_1x1.bn"},
            **{IDENTITY: "rbr_identity", FUSED: "rbr_reparam", SE_DOWN: "se.down", SE_UP: "se.up"},
        },
    ),
    "timm": Naming(
        stem="stem",
        block="stages.{stage}.{block}",
        first_stage=0,
        head="head.fc",
        parts={
            **{CONV3: "conv_kxk.conv", BN3: "conv_kxk.bn", CONV1: "conv_1x1.conv", BN1: "conv_1x1.bn"},
            **{IDENTITY: "identity", FUSED: "reparam_conv", SE_DOWN: "attn.fc1", SE_UP: "attn.fc2"},
        },
    ),
    "mmpretrain": Naming(
        stem="backbone.stem",
        block="backbone.stage_{stage}.{block}",
        first_stage=1,
        head="head.fc",
        parts={
            **{CONV3: "branch_3x3.conv", BN3: "branch_3x3.norm", CONV1: "branch_1x1.conv", BN1: "branch_1x1.norm"},
            **{IDENTITY: "branch_norm", FUSED: "branch_reparam"},
            **{SE_DOWN: "se_layer.conv1.conv", SE_UP: "se_layer.conv2.conv"},
        },
    ),
}


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint file.

    Attributes:
        path: of the file.
        naming: a key of :data:`NAMINGS`.
        form: what the file holds, branches or the convolutions that they were fused into.
        state: under our names, with a branch's kind in the place of its number.
        metadata: what a file that :func:`repvgg.model.write_weights` wrote says of itself, and the choices that a
            checkpoint of a training says; empty for others.
        name: what the file calls ``state``; empty for a file with one network.
        taken: in words which of several networks ``state`` is; empty likewise.
    """

    path: Path
    naming: str
    form: Form
    state: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    name: str = ""
    taken: str = ""

    @property
    def num_classes(self) -> int | None:
        """Outputs of the classifier; None for a file without one."""
        return len(self.state["head.weight"]) if "head.weight" in self.state else None

    @property
    def classes(self) -> list[str] | None:
        """What its classes are called, in the order of the outputs; None for a file that does not say it."""
        return self._names("classes")

    @property
    def class_words(self) -> list[str] | None:
        """For readers, where :attr:`classes` are mere codes."""
        return self._names("class_words")

    def _names(self, key: str) -> list[str] | None:
        try:
            names = json.loads(self.metadata.get(key, "null"))
        except ValueError:
            return None
        fits = isinstance(names, list) and len(names) == self.num_classes
        return names if fits and all(isinstance(name, str) for name in names) else None

    @property
    def depths(self) -> list[int]:
        """Blocks of each stage after the stem's."""
        blocks = [(int(found[2]), int(found[3])) for found in map(OUR_KEY.fullmatch, self.state) if _is_layer(found)]
        return [1 + max(block for of, block in blocks if of == stage) for stage in sorted({of for of, _ in blocks})]

    @property
    def channels(self) -> list[int]:
        """Outputs of the stem and of each stage, of the first convolution that has a name in its first block."""
        return [stage[0].shape[0] for stage in _kernels(self.state).values()]

    @property
    def groups(self) -> int:
        """The most of any layer."""
        return _groups(_kernels(self.state))

    def shallow(self, blocks: int) -> Weights:
        """The same with at most so many blocks in each stage: a quick look at the design."""
        kept = {
            key: tensor
            for key, tensor in self.state.items()
            if not (_is_layer(found := OUR_KEY.fullmatch(key)) and int(found[3]) >= blocks)
        }
        return replace(self, state=kept)

    @property
    def architecture(self) -> str:
        """Depths, channels, groups, branches, SE and classes, as far as names and shapes show them."""
        return _architecture(self.state)


class WeightsMismatchError(ValueError):
    """A file and a model of other architectures."""


def read_weights(path: str | Path, which: str | None = None) -> Weights:
    """Read a checkpoint file, whoever wrote it. No code in it is run.

    Known are files of this repository (Lightning's .ckpt or a plain state dict), of the authors, of timm and of
    mmpretrain, each in train or deploy form, in torch's format or as safetensors; the tensors may lie under a name
    such as ``state_dict`` or ``model``, and their own names may begin with what DDP (``module.``), torch.compile
    (``_orig_mod.``) or a LightningModule (``net.``) adds.

    Args:
        which: of a file with averaged weights too, such as ``{state_dict, state_dict_ema}``: ``ema``, ``raw`` or the
            name in the file. None for the averaged ones, which are what was validated.

    Raises:
        ValueError: no such file, not a file of tensors alone, or tensors that are no RepVGG's; or see
            :func:`repvgg.model.tensorfile.read_tensor_file`.
    """
    path = Path(path)
    file = read_tensor_file(path, which)
    state = without_prefixes(file.state)
    if any(re.search(r"stage3_(first|second)\.|_aux\.|\bpost_se\.", key) for key in state):
        raise ValueError(
            f"{path} is of RepVGGplus-L2pse, another network (auxiliary heads, squeeze-and-excitation after the ReLU), "
            "which this repository does not have: take one of the RepVGG variants of conf/model"
        )
    # What timm's reparameterize_model leaves behind in a deployed network.
    state = {key: tensor for key, tensor in state.items() if not key.endswith("id_tensor")}

    # By the number of names that a naming knows: the classifier's alone says nothing, since several share it.
    naming = max(NAMINGS, key=lambda name: sum(NAMINGS[name].ours(key) is not None for key in state))
    ours = {key: NAMINGS[naming].ours(key) for key in state}
    unknown = [key for key, our_key in ours.items() if our_key is None]
    if unknown:
        raise ValueError(
            f"{path} is no RepVGG in a naming known here ({', '.join(NAMINGS)}). Nearest is {naming}, which has no "
            f"{some(unknown)}"
        )
    found = {str(our_key): state[key] for key, our_key in ours.items()}
    whole = [key for key, tensor in found.items() if not key.endswith(COUNTER) and not tensor.is_floating_point()]
    if whole:
        kind = str(found[whole[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{path} holds {kind} in {some(whole)}, where weights are: a quantized file is no checkpoint of this "
            "network. Take the one in floating point that it was made from"
        )
    if naming == "ours":
        found = {name: found[key] for key, name in kind_names(found).items()}
    form = form_of(found)
    if form is None:
        raise ValueError(
            f"{path} holds no block, or branches and fused convolutions at once, so it is neither a train form nor a "
            "deploy form. Write it again from one model"
        )
    return Weights(path, naming, form, found, file.metadata, file.name, file.taken)


def load_weights(net: nn.Module, weights: Weights, *, head: Head = "keep", assign: bool = False) -> None:
    """Copy a file's tensors into a :class:`RepVGG` or its deploy form; every one of them, or none.

    Args:
        net: in the form that the file has.
        weights: of :func:`read_weights`.
        head: "fresh" leaves the classifier as it was initialised, for other classes than the file's.
        assign: ``net``, which may be on the meta device, takes the tensors themselves, in the precision of the file.

    Raises:
        WeightsMismatchError: tensors that are missing, too many or of another shape. A BatchNorm's
            ``num_batches_tracked`` may be missing: nothing is computed from it.
        ValueError: the other form, or a classifier of other classes.
    """
    own = net.state_dict()
    names = kind_names(own)
    _require_fit({names[key]: tensor for key, tensor in own.items()}, weights, head)
    for key, kind in names.items():
        if kind in weights.state and not (head == "fresh" and kind.startswith("head.")):
            own[key] = weights.state[kind]
        elif assign and own[key].is_meta:  # a counter of batches that the file does not have
            own[key] = torch.zeros_like(own[key], device="cpu")
    net.load_state_dict(own, assign=assign)


def fits(net: nn.Module, weights: Weights) -> bool:
    """Whether ``net``, which may be on the meta device, has the file's form and shapes up to the classifier."""
    own = net.state_dict()
    names = kind_names(own)
    try:
        _require_fit({names[key]: tensor for key, tensor in own.items()}, weights, "fresh")
    except ValueError:
        return False
    return True


def distance(net: nn.Module, weights: Weights) -> tuple[int, int]:
    """How many tensors only one of the two has, and how many have other shapes, up to the classifier.

    ``net`` may be on the meta device. Of two variants of one design the first number is 0.
    """
    own = net.state_dict()
    names = kind_names(own)
    ours, theirs = (
        {key: t.shape for key, t in state.items() if not key.startswith("head.")}
        for state in ({names[key]: tensor for key, tensor in own.items()}, weights.state)
    )
    alone = [key for key in ours.keys() ^ theirs.keys() if not key.endswith(COUNTER)]
    return len(alone), sum(ours[key] != theirs[key] for key in ours.keys() & theirs.keys())


def damage(weights: Weights) -> list[str]:
    """What no training leaves in a file: values that are not finite, and negative variances."""
    table, found = NAMINGS[weights.naming], []
    for key, tensor in weights.state.items():
        name = table.theirs(key) or key
        if not_finite := int((~torch.isfinite(tensor)).sum()):
            found.append(f"{name} has {not_finite} values that are not finite")
        elif key.endswith(".running_var") and (tensor < 0).any():
            found.append(f"{name} has negative variances")
    return found if len(found) <= 3 else [*found[:3], f"{len(found) - 3} more tensors"]


def initialize(net: nn.Module, weights: Weights, classes: Sequence[str] | None = None) -> str:
    """Begin a training from a file: its weights, and its classifier where that is of the same classes.

    Args:
        classes: names of those that ``net`` is to learn. Where they or the file's have no names, it is their number
            that counts.

    Returns:
        one line on what was taken.

    Raises:
        ValueError: see :func:`load_weights`; a deploy form cannot be trained.
    """
    count = len(net.state_dict()["head.weight"])
    differing = difference(weights.classes, classes, "the file")
    head: Head = "keep" if weights.num_classes == count and not differing else "fresh"
    load_weights(net, weights, head=head)
    said = f"; {weights.taken}" if weights.taken else ""
    taken = f"Initial weights: {weights.path} ({weights.naming} naming{said})"
    if head == "keep":
        return f"{taken}, its classifier of {count} classes too"
    if weights.num_classes == count:
        return f"{taken}; the classifier is fresh, since the file's is of other classes: {differing}"
    return f"{taken}; the classifier is fresh, since the file's has {weights.num_classes or 'no'} classes, not {count}"


def form_of(state: Iterable[str]) -> Form | None:
    """Train or deploy, by our names; None for neither or a mixture."""
    forms: set[Form] = set()
    for key in state:
        if found := OUR_KEY.fullmatch(key):
            if found[4].startswith("branches."):
                forms.add("train")
            elif found[4] == FUSED or found[4].startswith("parts."):
                forms.add("deploy")
    return forms.pop() if len(forms) == 1 else None


# --- names and shapes -----------------------------------------------------------------------------------------------


def kind_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Our keys, and the same with kinds of branches for their numbers; a second one of a kind is ``3x3#2``."""
    branches: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in state.items():
        if found := re.fullmatch(r"(.*\b(?:branches|parts))\.(\d+)\.(.*)", key):
            branches[found[1]][found[2]][found[3]] = tensor
    names = {key: key for key in state}
    for block, numbered in branches.items():
        seen: Counter[str] = Counter()
        for number in sorted(numbered, key=int):
            kind = _kind(numbered[number])
            seen[kind] += 1
            label = kind if seen[kind] == 1 else f"{kind}#{seen[kind]}"
            for leaf in numbered[number]:
                names[f"{block}.{number}.{leaf}"] = f"{block}.{label}.{leaf}"
    return names


def _kind(tensors: Mapping[str, Tensor]) -> str:
    """``3x3``, ``identity``, or the tensors' names where a branch is of a design of one's own."""
    conv = tensors.get("conv.weight")
    rest = {name for name in tensors if not name.startswith("bn.") and name not in ("conv.weight", "conv.bias")}
    if rest:
        return "+".join(sorted(rest)).replace(".", "_")
    if conv is not None and "conv.bias" in tensors and conv.shape[1:].numel() == 1:
        return "identity"  # of a block that deploys as a sum: a factor and a bias per channel
    return "identity" if conv is None else "x".join(map(str, conv.shape[2:]))


def _require_fit(own: Mapping[str, Tensor], weights: Weights, head: Head) -> None:
    """Raise unless the file has the tensors of the model; ``own`` are the model's, with kinds of branches."""
    form = form_of(own)
    if form == "train" and weights.form == "deploy":
        raise ValueError(
            f"{weights.path} is a deploy form ({weights.naming} naming), the model is a train form. Branches cannot be "
            "recovered from their sum, so this file cannot be trained, only evaluated: python src/evaluate.py "
            f"forms=deploy ckpt={weights.path}. Training needs a file of the train form"
        )
    if form == "deploy" and weights.form == "train":
        raise ValueError(
            f"{weights.path} is a train form ({weights.naming} naming), the model is a deploy form. Load it into the "
            "train form, then convert: repvgg.model.to_deploy(net)"
        )

    def wanted(key: str) -> bool:
        return not (head == "fresh" and key.startswith("head."))

    ours = {key: tensor for key, tensor in own.items() if wanted(key)}
    theirs = {key: tensor for key, tensor in weights.state.items() if wanted(key)}
    missing = [key for key in ours if key not in theirs and not key.endswith(COUNTER)]
    surplus = [key for key in theirs if key not in ours]
    reshaped = [key for key, tensor in ours.items() if key in theirs and tensor.shape != theirs[key].shape]
    if not (missing or surplus or reshaped):
        return
    if not (missing or surplus) and all(key.startswith("head.") for key in reshaped):
        raise ValueError(
            f"{weights.path} has a classifier of {weights.num_classes} classes, the model one of "
            f"{len(own['head.weight'])}. Evaluate it on data with its classes (data=…), or finetune it, which begins "
            f"with a fresh classifier: python src/train.py init_from={weights.path}"
        )
    naming = NAMINGS[weights.naming]

    def shown(keys: list[str]) -> str:
        return some([naming.theirs(key) or key for key in keys])

    counts = [f"{len(missing)} tensors are missing ({shown(missing)})"] if missing else []
    counts += [f"{len(surplus)} tensors are too many ({shown(surplus)})"] if surplus else []
    if reshaped:
        first = reshaped[0]
        shapes = [" × ".join(map(str, tensor[first].shape)) for tensor in (theirs, ours)]
        counts.append(
            f"{len(reshaped)} tensors have another shape (first {shown([first])}: {shapes[0]}, the model's {shapes[1]})"
        )
    raise WeightsMismatchError(
        f"{weights.path} ({weights.naming} naming) does not fit the model: {'; '.join(counts)}.\n"
        f"  the file:  {_architecture(weights.state)}\n  the model: {_architecture(own)}\n"
        "Choose model= and ablation= so that both are one network"
    )


def _is_layer(found: re.Match[str] | None) -> TypeGuard[re.Match[str]]:
    """Whether a key is of a layer of a stage after the stem."""
    return found is not None and found[2] is not None and found[3] != "shortcut"


def _kernels(state: Mapping[str, Tensor]) -> dict[int, list[Tensor]]:
    """The first convolution of every layer, by stage; the stem's stage is -1."""
    kernels: dict[tuple[int, int], Tensor] = {}
    for key, tensor in state.items():
        found = OUR_KEY.fullmatch(key)
        if found is not None and found[3] != "shortcut" and found[4].endswith("conv") and found[5] == "weight":
            kernels.setdefault((-1, 0) if found[1] == "stem" else (int(found[2]), int(found[3])), tensor)
    stages: dict[int, list[Tensor]] = defaultdict(list)
    for (stage, _), kernel in sorted(kernels.items(), key=lambda item: item[0]):
        stages[stage].append(kernel)
    return stages


def _groups(stages: Mapping[int, list[Tensor]]) -> int:
    groups, channels = 1, None
    for kernel in (kernel for stage in stages.values() for kernel in stage):
        groups = max(groups, channels // kernel.shape[1] if channels else 1)
        channels = kernel.shape[0]
    return groups


def _architecture(state: Mapping[str, Tensor]) -> str:
    """Depths, channels, groups, branches, SE and classes, as far as names and shapes show them."""
    keys = [found for found in map(OUR_KEY.fullmatch, state) if found is not None]
    kinds = dict.fromkeys(
        found[4].split(".")[1]
        for found in keys
        if found[3] != "shortcut" and found[4].startswith(("branches.", "parts."))
    )
    stages = _kernels(state)
    groups = _groups(stages)
    parts = [
        f"{'+'.join(str(len(stage)) for stage in stages.values())} layers of "
        f"{', '.join(str(stage[0].shape[0]) for stage in stages.values())} channels",
        f"{'branches' if form_of(state) == 'train' else 'parts'} {' '.join(kinds)}" if kinds else "fused",
    ]
    if groups > 1:
        parts.append(f"groups {groups}")
    if any(found[3] == "shortcut" for found in keys):
        parts.append("shortcuts")
    if any(".se." in key for key in state):
        parts.append("squeeze-and-excitation")
    parts.append(f"{len(state['head.weight'])} classes" if "head.weight" in state else "no classifier")
    return "; ".join(parts)
