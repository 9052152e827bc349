"""Whose implementation is measured: this repository's, timm's, or any that a user can call."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.cli import ROOT
from repvgg.model import equivalence, to_deploy
from repvgg.model.fused import unfused

OURS = "ours"
#: Where `make peers` puts timm. Not into the environment: torchmetrics imports a torchvision that it finds there, and
#: PyPI's is of CUDA's build, which does not load beside a CPU's torch.
PEERS = ROOT / ".peers"
#: Not a dependency. --no-deps, because torchvision would pull in another torch; these three run beside the pinned one.
INSTALL_TIMM = "pip install --no-deps --target .peers timm==1.0.31 torchvision==0.28.0 huggingface_hub==1.0.0"
#: Two forms whose float32 logits are further apart than this (relative L2) are not one function.
TOLERANCE = 1e-3


def _lacks_nothing(model: str) -> str | None:
    return None


@dataclass(frozen=True)
class Side:
    """One implementation. It can be pickled, because a fresh process measures memory.

    Attributes:
        name: as tables call it.
        build: of a variant's name, the network in train form.
        deploy: of a network in train form, a new one in deploy form; None where there is none.
        context: what this side is built and run in.
        lacks: of a variant's name, why this side has no such network, or None.
    """

    name: str
    build: Callable[[str], nn.Module]
    deploy: Callable[[nn.Module], nn.Module] | None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    lacks: Callable[[str], str | None] = _lacks_nothing

    @property
    def lacks_deploy(self) -> str | None:
        """Why there is no deploy form, or None."""
        if self.deploy is not None:
            return None
        return f"{self.name} has no deploy form: --against-deploy module:callable names what makes one"

    @property
    def is_ours(self) -> bool:
        """Whether it is this repository's, in whatever context."""
        return self.name.startswith(OURS)


# --- ours ------------------------------------------------------------------------------------------------------------


def our_net(model: str) -> nn.Module:
    """The network of a variant as `train.py model=…` would train it on ImageNet, in train form."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides=[f"model={model}", "ablation=full", "data=imagenet"])
    net: nn.Module = instantiate(config.net, num_classes=1000)
    return net


def ours() -> Side:
    """This repository as it comes."""
    return Side(OURS, our_net, to_deploy)


def ours_unfused() -> Side:
    """This repository's blocks layer by layer, as others compute them."""
    return Side(f"{OURS}, unfused", our_net, to_deploy, context=unfused)


# --- timm ------------------------------------------------------------------------------------------------------------


@cache
def import_timm() -> Any:
    """timm, beside whichever torch there is.

    Raises:
        ValueError: it is not installed.
    """
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    try:
        _import_torchvision()
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"--against timm: it cannot be imported ({error}). It is no dependency of this repository: "
            f"make peers, or\n  python -m {INSTALL_TIMM}"
        ) from error


def _import_torchvision() -> None:
    """timm imports torchvision, whose compiled operators may be of another build (CUDA's) than torch.

    They do not load then, and torchvision's own import fails where it says something of an operator that is not
    there. RepVGG uses none of them: it is enough that their names exist.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        spec = importlib.util.find_spec("torchvision")
        if "torchvision::" not in str(error) or spec is None or spec.origin is None:
            raise
        text = Path(spec.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
        for operator in dict.fromkeys(re.findall(r'register_fake\("torchvision::(\w+)"\)', text)):
            _operators().define(f"{operator}(Tensor a) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


@cache
def _operators() -> torch.library.Library:
    """It must outlive the import: the definitions go with it."""
    return torch.library.Library("torchvision", "DEF")


def _timm_net(model: str) -> nn.Module:
    net: nn.Module = import_timm().create_model(model)
    return net


def _timm_deploy(net: nn.Module) -> nn.Module:
    import_timm()
    deployed: nn.Module = importlib.import_module("timm.utils.model").reparameterize_model(net)
    return deployed


def _timm_lacks(model: str) -> str | None:
    return None if model in import_timm().list_models("repvgg_*") else f"timm has no {model}"


# --- any other -------------------------------------------------------------------------------------------------------


def _callable(option: str, spec: str) -> Callable[..., Any]:
    """What `module.path:name` names; modules are also looked for in the current directory.

    Raises:
        ValueError: there is no such thing.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise ValueError(f"{option} {spec}: write timm, or module.path:callable as in mine:build")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{option} {spec}: {module_name} cannot be imported from here ({error}); PYTHONPATH=FOLDER adds a folder"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{option} {spec}: {module_name} has no callable {name}, but {', '.join(there) or 'none'}")
    return found


def _called_net(spec: str, model: str) -> nn.Module:
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the page
            net = _callable("--against", spec)(model)
    except Exception as error:
        raise ValueError(f"--against {spec}: {spec}({model!r}) raised {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"--against {spec}: {spec}({model!r}) is a {type(net).__name__}, not a torch.nn.Module")
    return net


def _called_deploy(option: str, spec: str, net: nn.Module) -> nn.Module:
    """``spec`` is of a callable, or of one whose attribute ``deploy`` is meant."""
    found = _callable(option, spec)
    with redirect_stdout(sys.stderr):
        deployed = (getattr(found, "deploy") if option == "--against" else found)(net)  # noqa: B009
    if not isinstance(deployed, nn.Module) or deployed is net:
        what = "the network itself" if deployed is net else f"a {type(deployed).__name__}"
        raise ValueError(f"{option} {spec}: the deploy form must be a new torch.nn.Module, it is {what}")
    return deployed


def _peer(spec: str, deploy_spec: str | None) -> Side:
    if spec == "timm":
        import_timm()
        return Side("timm", _timm_net, _timm_deploy, lacks=_timm_lacks)
    build = _callable("--against", spec)
    deploy: Callable[[nn.Module], nn.Module] | None = None
    if deploy_spec is not None:
        _callable("--against-deploy", deploy_spec)
        deploy = partial(_called_deploy, "--against-deploy", deploy_spec)
    elif callable(getattr(build, "deploy", None)):
        deploy = partial(_called_deploy, "--against", spec)
    return Side(spec, partial(_called_net, spec), deploy)


def peers(specs: Sequence[str], deploy_spec: str | None) -> list[Side]:
    """The implementations that `--against` and `--against-deploy` name.

    Raises:
        ValueError: one cannot be imported, or it is not clear whose the deploy form is.
    """
    called = [spec for spec in dict.fromkeys(specs) if spec != "timm"]
    if deploy_spec is not None and len(called) != 1:
        raise ValueError(
            f"--against-deploy {deploy_spec} belongs to one --against module:callable, and there are {len(called)}: "
            "give a callable an attribute deploy instead"
        )
    return [_peer(spec, None if spec == "timm" else deploy_spec) for spec in dict.fromkeys(specs)]


def require_one_function(side: Side, net: nn.Module, deployed: nn.Module) -> None:
    """Two forms that are compared compute the same; a speed of anything else says nothing.

    Raises:
        ValueError: they do not.
    """
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    distance = equivalence(net, deployed, images, dtype=torch.float32).rel_l2
    if not distance < TOLERANCE:
        raise ValueError(
            f"{side.name}: its deploy form is another function than its train form (relative L2 of the logits "
            f"{distance:.3g} in float32, at most {TOLERANCE:g})"
        )
