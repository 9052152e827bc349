"""From a checkpoint to its network: which model=, ablation= and data= of conf/ it is of, and the network in a form.

What is typed comes first, then the run that left the file, then what the file says of itself, then its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from repvgg.classes import require_same
from repvgg.cli import NODE_OF_GROUP, ROOT, options
from repvgg.data.manifest import Manifest, read_manifest
from repvgg.identity import key_of

if TYPE_CHECKING:
    from torch import dtype, nn

    from repvgg.model import Weights
    from repvgg.model.weights import Form

#: What a checkpoint's run says of its network and data: the groups, and the nodes whose values may have been set.
#: (Not the recipe, which may also set precision and compilation.)
OF_THE_NETWORK = {**NODE_OF_GROUP, "data": "data"}
#: What is typed of a network's own nodes begins with one of these.
NODES = tuple(f"{node}." for node in NODE_OF_GROUP.values())


@dataclass(frozen=True)
class Settled:
    """What a checkpoint and what was typed say together.

    Attributes:
        cfg: the config of the entry point, without Hydra's own node. Its ``net.num_classes`` is the data's.
        choices: of the config groups.
        known: of model, ablation and data those that are not merely the default: a deploy form of plain convolutions
            no longer says which ablation it was.
        origin: where choices are from that nobody typed, to be shown; empty if there are none.
    """

    cfg: DictConfig
    choices: Mapping[str, str]
    known: Mapping[str, str]
    origin: str


@dataclass(frozen=True)
class Network:
    """A checkpoint as a network, in eval mode.

    Attributes:
        net: in the form asked for.
        train_form: what ``net`` was folded from; None for a file of the deploy form. The same as ``net`` where that is
            the train form.
        weights: of the file.
        settled: config and choices; ``cfg.net.num_classes`` is the file's.
    """

    net: nn.Module
    train_form: nn.Module | None
    weights: Weights
    settled: Settled

    @property
    def form(self) -> Form:
        """Of ``net``."""
        return "train" if self.net is self.train_form else "deploy"


def load_network(
    config_name: str,
    checkpoint: str | Path,
    typed: Sequence[str],
    *,
    form: Form | None = None,
    precision: dtype | None = None,
    fold_dtype: dtype | None = None,
) -> Network:
    """Read a checkpoint of any naming and give its network in a form, with as many classes as the file has.

    Called in an entry point's Hydra main. It imports torch: check what is cheap to check before.

    Args:
        config_name: of conf/, with the groups of train.yaml among its defaults.
        checkpoint: see :func:`repvgg.model.read_weights`.
        typed: the overrides of the command line (``HydraConfig.get().overrides.task``).
        form: None for the file's.
        precision: of the network, such as ``torch.float32``; None for the file's, tensor by tensor.
        fold_dtype: see :func:`repvgg.model.to_deploy`; None for float64.

    Raises:
        ValueError: no such file, no RepVGG's file, choices that it does not fit or that are ambiguous, or a deploy
            form where the train form is asked for. Each says what to do.
    """
    import torch

    from repvgg.model import load_weights, read_weights, to_deploy

    weights = read_weights(checkpoint, _which(typed))
    if form == "train" and weights.form == "deploy":
        raise ValueError(
            f"{checkpoint} is a deploy form ({weights.naming} naming), and branches cannot be recovered from their "
            "sum: form=train needs the file that it was converted from; form=deploy takes this one"
        )
    if weights.num_classes is None:
        raise ValueError(
            f"{checkpoint} has no classifier, so it is no whole network. A training can begin with it, which adds one: "
            f"python src/train.py init_from={checkpoint}"
        )
    settled = settle(config_name, checkpoint, typed)
    if not {"net.num_classes", "data.num_classes"} & set(map(key_of, typed)):
        settled.cfg.net.num_classes = weights.num_classes
    net = _made(settled.cfg.net, weights.form, with_values=False)
    if dict(net.named_buffers()).keys() - net.state_dict().keys():  # constants that no file has, as Orepa's
        net = _made(settled.cfg.net, weights.form, with_values=True)
    with fitting_choices(weights, settled.choices["ablation"]):
        load_weights(net.eval(), weights, assign=True)
    if precision is not None:
        net = net.to(precision)
    if weights.form == "deploy":
        return Network(net, None, weights, settled)
    deploy = form == "deploy"
    return Network(to_deploy(net, fold_dtype=fold_dtype or torch.float64) if deploy else net, net, weights, settled)


def settle(config_name: str, checkpoint: str | Path, typed: Sequence[str]) -> Settled:
    """Compose a config in which model, ablation and data are the checkpoint's where they were not typed.

    Cheap for a checkpoint of a run. Any other file whose model or ablation is not typed is read, which imports torch.

    Args: see :func:`load_network`.

    Raises:
        ValueError: see :func:`load_network`.
    """
    of_file, origin = overrides_of_run(checkpoint, typed), "Of the checkpoint's run: {}"
    known = {key_of(override) for override in [*typed, *of_file]}
    certain = True
    if not {"model", "ablation"} <= known:
        of_file, origin, certain = _of_the_file(checkpoint, typed)
    try:
        cfg = compose(config_name, overrides=[*of_file, *typed], return_hydra_config=True)
    except HydraException as error:
        if not of_file:
            raise
        raise ValueError(
            f"The choices of the run that left {checkpoint} are no longer there ({' '.join(of_file)}): {error}\n"
            "Choose model=, ablation= and data= yourself"
        ) from error
    choices = {str(group): str(name) for group, name in cfg.hydra.runtime.choices.items() if "/" not in str(group)}
    known = {key_of(override) for override in [*typed, *of_file]} - (set() if certain else {"ablation"})
    return Settled(
        cfg=OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]),
        choices=choices,
        known={group: choices[group] for group in OF_THE_NETWORK if group in known},
        origin=origin.format(" ".join(of_file)) if of_file else "",
    )


def require_three_channels(settled: Settled) -> None:
    """Raise ValueError for a network that does not take images, which have three channels in every data set."""
    channels = settled.cfg.net.get("in_channels", 3)
    if channels != 3:
        raise ValueError(f"the checkpoint's network has net.in_channels={channels}, and images have 3 channels")


# --- what the run says, and the file ----------------------------------------------------------------------------------


def overrides_of_run(checkpoint: str | Path, typed: Sequence[str]) -> list[str]:
    """The choices of network and data of the run that left a checkpoint, as overrides; none for any other file.

    Args:
        checkpoint: ``RUN/checkpoints/best.ckpt`` of a RUN that holds Hydra's files.
        typed: overrides that come first; a group that is typed takes the run's values of its node away too.
    """
    saved = Path(checkpoint).absolute().parent.parent / ".hydra" / "hydra.yaml"
    if not saved.is_file():
        return []
    hydra = OmegaConf.load(saved).hydra
    keys = {key_of(override) for override in typed}
    groups = {group: node for group, node in OF_THE_NETWORK.items() if group not in keys}
    overrides = [f"{group}={hydra.runtime.choices[group]}" for group in groups if group in hydra.runtime.choices]
    nodes = tuple(f"{node}." for node in groups.values())
    return overrides + [o for o in hydra.overrides.task if key_of(o).startswith(nodes) and key_of(o) not in keys]


def _of_the_file(checkpoint: str | Path, typed: Sequence[str]) -> tuple[list[str], str, bool]:
    """Overrides that a file's metadata says, or its tensors; where they are from; and whether the ablation is sure."""
    from repvgg.model import read_weights

    weights = read_weights(checkpoint, _which(typed))
    given = _options_of(typed)
    said = _said(weights.metadata, typed)
    chosen = {**given, **_options_of(said)}
    if chosen.keys() == NODE_OF_GROUP.keys() and _distance(
        chosen["model"], chosen["ablation"], [*said, *typed], weights
    ) == (0, 0):
        return said, "As the file says: {}", True
    found = _matches(weights, typed, **given)
    if not found:
        raise _unmatched(weights, typed, given)
    if len(found) > 1:
        alike = " and ".join(_as_overrides(match, given) for match in found)
        raise ValueError(
            f"{checkpoint} fits {alike} alike ({weights.architecture}): nothing in the file tells them apart, so type "
            "the one that it is"
        )
    overrides = _as_overrides(found[0], given).split()
    certain = weights.form == "train" or "ablation" in given or found[0][1] != _default("ablation")
    unsaid = "" if certain else " (a deploy form does not say its ablation)"
    return overrides, f"Found by names and shapes of the tensors: {{}}{unsaid}", certain


def _which(typed: Sequence[str]) -> str | None:
    """The value of ``weights=``."""
    values = [o.value() for o in OverridesParser.create().parse_overrides(list(typed)) if o.key_or_group == "weights"]
    return None if not values or values[-1] is None else str(values[-1])


def _options_of(overrides: Sequence[str]) -> dict[str, str]:
    """Model and ablation, where the overrides choose them."""
    return {key_of(o): o.partition("=")[2] for o in overrides if key_of(o) in NODE_OF_GROUP}


def _as_overrides(match: tuple[str, str], typed: Mapping[str, str]) -> str:
    named = dict(zip(NODE_OF_GROUP, match, strict=True))
    return " ".join(f"{group}={name}" for group, name in named.items() if group not in typed)


#: What a file may say of a network beside the names of its choices. Numbers alone: nothing that would be imported.
NUMBERS = ("depths", "width_a", "width_b", "groups", "squeeze_excite", "in_channels", "strides")


def _said(metadata: Mapping[str, str], typed: Sequence[str]) -> list[str]:
    """Choices and numbers of the network that a file's metadata has and that were not typed, as overrides."""
    keys = {key_of(override) for override in typed}
    said = [
        f"{group}={metadata[group]}"
        for group in OF_THE_NETWORK
        if group not in keys and metadata.get(group) in options(group)
    ]
    if "model" in keys:
        return said
    try:
        numbers = json.loads(metadata.get("net", "{}"))
    except ValueError:
        numbers = {}
    if not isinstance(numbers, dict):
        numbers = {}
    return said + [
        f"net.{name}={json.dumps(numbers[name])}"
        for name in NUMBERS
        if f"net.{name}" not in keys and _is_numeric(numbers.get(name))
    ]


def manifest_of(data: DictConfig) -> Manifest:
    """Of the validation images; embedded data is written first where it is not there yet."""
    if data.prepare is not None:
        from hydra.utils import instantiate

        instantiate(data.prepare)()
    return read_manifest(data.val_file)


def require_same_classes(weights: Weights, manifest: Manifest, data: DictConfig) -> None:
    """Raise ValueError where the network's outputs stand for other classes than the labels of the data."""
    then = "Give data= and data.dir= of its training, or other data with these classes in their order"
    classes = manifest.names.get("classes")
    require_same(weights.classes, classes, checkpoint=str(weights.path), data=data.val_file, then=then)


def metadata_of(settled: Settled) -> dict[str, str]:
    """Choices and numbers of a network for a file's metadata, such that :func:`settle` finds them there again."""
    model = settled.choices["model"]
    usual, net = _config(model, _default("ablation"), []).net, settled.cfg.net
    numbers = {name: list(net[name]) if OmegaConf.is_list(net[name]) else net[name] for name in NUMBERS}
    other = {name: value for name, value in numbers.items() if value != usual[name]}
    return {**settled.known, **({"net": json.dumps(other)} if other else {})}


def _is_numeric(value: object) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and all(isinstance(each, int | float) for each in value)
    )


# --- what fits --------------------------------------------------------------------------------------------------------


@contextmanager
def fitting_choices(weights: Weights, ablation: str) -> Iterator[None]:
    """Add to the error of a file that does not fit the model which ``model=`` and ``ablation=`` of conf/ it fits."""
    from repvgg.model import WeightsMismatchError

    try:
        yield
    except WeightsMismatchError as error:
        found = _matches(weights, [], ablation=ablation)
        fitting = [f"model={model}" for model, _ in found]
        if not found:
            fitting = [f"model={model} ablation={name}" for model, name in _matches(weights, [])]
        said = f"This file fits {' or '.join(fitting)}" if fitting else "It fits no model= and ablation= of conf/"
        raise ValueError(f"{error}. {said}") from error


def _matches(
    weights: Weights, typed: Sequence[str], *, model: str | None = None, ablation: str | None = None
) -> list[tuple[str, str]]:
    """Every model and ablation of conf/ whose network has the file's tensors, with the typed values of both nodes.

    Of a deploy form only the first such ablation, since all whose blocks become one convolution are one network then.
    """
    nets = {name: net for name, net in _nets(weights, typed, model).items() if list(net.depths) == weights.depths}
    designs: dict[bool, list[str]] = {}  # that have the file's names, with squeeze-and-excitation and without
    for name, net in nets.items():
        if net.squeeze_excite not in designs:
            designs[net.squeeze_excite] = _designs(weights, name, typed, ablation)
        found = [design for design in designs[net.squeeze_excite] if _distance(name, design, typed, weights) == (0, 0)]
        if found:  # and so does every model that the typed values make the same
            return [(other, design) for other in nets if nets[other] == net for design in found]
    return []


def _nets(weights: Weights, typed: Sequence[str], model: str | None) -> dict[str, DictConfig]:
    """The values of all models, or of the typed one; first those with the file's depths, channels and groups."""

    def unlike(net: DictConfig) -> tuple[int, int, bool]:
        factors = zip((64, 128, 256, 512), [*[net.width_a] * 3, net.width_b], strict=True)  # paper, section 3.4
        channels = [int(base * factor) for base, factor in factors]
        deeper = sum(abs(one - other) for one, other in zip(net.depths, weights.depths, strict=False))
        wider = sum(one != other for one, other in zip(channels, weights.channels[1:], strict=False))
        return deeper, wider, net.groups != weights.groups

    names = [model] if model else options("model")
    nets = {name: _config(name, _default("ablation"), typed).net for name in names}
    return dict(sorted(nets.items(), key=lambda item: unlike(item[1])))


def _designs(weights: Weights, model: str, typed: Sequence[str], ablation: str | None) -> list[str]:
    """The ablations whose tensors have the file's names."""
    found = []
    for design in [ablation] if ablation else _ablations():
        if _other_names(model, design, typed, weights) == 0:
            found.append(design)
            if weights.form == "deploy":
                break
    return found


def _other_names(model: str, ablation: str, typed: Sequence[str], weights: Weights) -> int:
    """Tensors that only one of a design and a file has, in the first blocks of a stage: all others are as these."""
    from repvgg.model import distance

    shallow = weights.shallow(2)
    # Names are a matter of the kinds of blocks, so small ones will do.
    small = [f"net.depths={shallow.depths}", "net.width_a=0.25", "net.width_b=0.125", "net.groups=1"]
    nodes = [override for override in typed if override.startswith(NODES)]
    net = _small(model, ablation, (*nodes, *small), weights.form)
    return len(weights.state) if net is None else distance(net, shallow)[0]


@cache
def _small(model: str, ablation: str, typed: Sequence[str], form: Form) -> nn.Module | None:
    return _candidate(model, ablation, typed, form, with_values=True)


def _distance(model: str, ablation: str, typed: Sequence[str], weights: Weights) -> tuple[int, int]:
    """Of a choice and a file, in the file's form; far for a design that a model's depths do not allow."""
    from repvgg.model import distance

    net = _candidate(model, ablation, typed, weights.form)
    return (len(weights.state), 0) if net is None else distance(net, weights)


def _candidate(
    model: str, ablation: str, typed: Sequence[str], form: Form, *, with_values: bool = False
) -> nn.Module | None:
    """The network of a choice; None where there is none, as of odd depths in pairs."""
    from hydra.errors import InstantiationException

    try:
        return _made(_config(model, ablation, typed).net, form, with_values=with_values)
    except (InstantiationException, ValueError):
        return None


def _made(node: DictConfig, form: Form, *, with_values: bool) -> nn.Module:
    """A network of the node: initialised, or in no time with no values, which for small ones takes longer."""
    import torch
    from hydra.utils import instantiate

    from repvgg.model import to_deploy

    with torch.device("cpu" if with_values else "meta"), torch.random.fork_rng(devices=[]):
        net: nn.Module = instantiate(node)
    if form == "train":
        return net
    # Folding on the meta device takes longer than folding numbers, whatever they are.
    return to_deploy(net if with_values else net.to_empty(device="cpu"))


def _config(model: str, ablation: str, typed: Sequence[str]) -> DictConfig:
    """What ``compose`` makes of the nodes of a network, in a hundredth of its time."""
    root = _yaml("train")
    cfg = OmegaConf.create({"data": {"num_classes": 1, "stem_stride": 2}})
    for node, (group, name) in zip(NODE_OF_GROUP.values(), (("model", model), ("ablation", ablation)), strict=True):
        cfg[node] = OmegaConf.merge(root[node], _yaml(f"{group}/{name}"))
    for override in OverridesParser.create().parse_overrides(list(typed)):
        if override.key_or_group.startswith(NODES):
            OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    return cfg


@cache
def _yaml(name: str) -> DictConfig:
    content = OmegaConf.load(ROOT / "conf" / f"{name}.yaml")
    assert isinstance(content, DictConfig)
    return content


def _default(group: str) -> str:
    """The option of train.yaml."""
    return next(str(entry[group]) for entry in _yaml("train").defaults if group in entry)


def _ablations() -> list[str]:
    """The default first: what a deploy form is taken for."""
    return sorted(options("ablation"), key=lambda name: name != _default("ablation"))


def _unmatched(weights: Weights, typed: Sequence[str], given: Mapping[str, str]) -> ValueError:
    """What is wrong with a file that fits no choice: where it differs from the nearest."""
    from repvgg.model import load_weights

    model = next(iter(_nets(weights, typed, given.get("model"))))
    ablations = [given["ablation"]] if "ablation" in given else _ablations()
    ablation = min(ablations, key=lambda name: _other_names(model, name, typed, weights))
    classes = f"net.num_classes={weights.num_classes or 1}"
    net = _candidate(model, ablation, [*typed, classes], weights.form)
    nearest = f"model={model} ablation={ablation}"
    assert net is not None, f"{nearest} is the default"
    try:
        load_weights(net, weights, head="fresh", assign=True)
    except ValueError as error:
        return ValueError(
            f"{error}. It fits none of conf/; compared is the nearest, {nearest}. What was trained with other "
            "values of net needs them typed here, too, as in net.width_a=0.5"
        )
    raise AssertionError(f"{nearest} fits after all")
