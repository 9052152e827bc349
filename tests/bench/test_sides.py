"""Other implementations: how they are named, found, refused, and what they are worth comparing with."""

from __future__ import annotations

import importlib.util
import pickle
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmark
from repvgg.bench import sides
from repvgg.bench.sides import Side, ours, ours_unfused, peers, require_one_function
from repvgg.model import count_parameters
from repvgg.model.fused import unfused
from support import peer
from support.networks import randomize, tiny
from support.official import RepVGG
from support.paper import VARIANTS


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where `make peers` was never run."""
    for name in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    sides.import_timm.cache_clear()


@pytest.mark.usefixtures("no_timm")
def test_without_timm_the_error_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"--against timm: it cannot be imported .*\n.* -m pip install --no-deps"):
        peers(["timm"], None)


@pytest.mark.parametrize(
    ("specs", "deploy", "says"),
    [
        (["tim"], None, "--against tim: write timm, or module.path:callable"),
        (["support.peer:"], None, "--against support.peer:: write timm, or module"),
        (["no_such_module:build"], None, "no_such_module cannot be imported from here"),
        (["support.peer:nothing"], None, r"support.peer has no callable nothing, but .*build"),
        (["support.peer:not_callable"], None, "has no callable not_callable"),
        (
            ["support.peer:small"],
            "support.peer:no",
            "--against-deploy support.peer:no: support.peer has no callable no",
        ),
        (["support.peer:small", "support.peer:with_its_own"], "support.peer:deploy", "belongs to one --against"),
    ],
)
def test_a_peer_that_is_not_there_is_named(specs: list[str], deploy: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        peers(specs, deploy)


def test_a_deploy_form_comes_from_an_attribute_or_an_option() -> None:
    without, own = peers(["support.peer:small", "support.peer:with_its_own"], None)
    (named,) = peers(["support.peer:small"], "support.peer:deploy")
    assert without.lacks_deploy == (
        "support.peer:small has no deploy form: --against-deploy module:callable names what makes one"
    )
    for side in (own, named):
        assert side.lacks_deploy is None
        net = randomize(side.build("repvgg_a0")).eval()
        assert isinstance(net, RepVGG)
        assert side.deploy is not None
        deployed = side.deploy(net)
        require_one_function(side, net, deployed)
        assert not [name for name in deployed.state_dict() if "rbr_dense" in name]
        assert not side.is_ours


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_module", r"no_module\('repvgg_a0'\) is a str, not a torch.nn.Module"),
        ("small", r"small\('repvgg_x9'\) raised KeyError: 'repvgg_x9'"),
    ],
)
def test_what_a_peer_builds_is_checked(name: str, says: str) -> None:
    (side,) = peers([f"support.peer:{name}"], None)
    with pytest.raises(ValueError, match=says):
        side.build("repvgg_x9" if name == "small" else "repvgg_a0")


def test_a_conversion_in_place_is_refused() -> None:
    (side,) = peers(["support.peer:small"], "support.peer:in_place")
    assert side.deploy is not None
    with pytest.raises(ValueError, match=r"must be a new torch.nn.Module, it is the network itself"):
        side.deploy(nn.Linear(1, 1))


def test_a_deploy_form_that_is_another_function_is_refused() -> None:
    net = peer.small("repvgg_a0").eval()
    side = Side("theirs", peer.small, peer.wrong)
    with pytest.raises(ValueError, match="theirs: its deploy form is another function than its train form"):
        require_one_function(side, net, peer.wrong(net))
    not_a_number = peer.deploy(net)
    nn.init.constant_(not_a_number.linear.bias, float("nan"))
    with pytest.raises(ValueError, match="another function"):
        require_one_function(side, net, not_a_number)


def test_what_a_peer_prints_is_not_part_of_the_page(capfd: pytest.CaptureFixture[str]) -> None:
    (side,) = peers(["support.peer:talkative"], None)
    side.build("repvgg_a0")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "a peer that prints" in printed.err


def test_sides_can_be_taken_to_another_process() -> None:
    (side,) = peers(["support.peer:with_its_own"], None)
    for one in (ours(), ours_unfused(), side):
        there = pickle.loads(pickle.dumps(one))
        assert (there.name, there.context, there.lacks_deploy) == (one.name, one.context, one.lacks_deploy)
    assert isinstance(there.build("repvgg_a0"), RepVGG)


def test_ours_unfused_is_the_same_network_layer_by_layer() -> None:
    side = ours_unfused()
    assert side.is_ours
    assert side.name != ours().name
    assert side.context is unfused
    assert count_parameters(side.build("repvgg_a0")) == VARIANTS["a0"].train_params


def test_the_adapter_in_the_help_fits_the_authors_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module called repvgg.py that imports its neighbour, as in their repository; the network is a tiny one."""
    checkout = tmp_path / "RepVGG"
    checkout.mkdir()
    (checkout / "se_block.py").write_text("from torch import nn\nclass SEBlock(nn.Module): pass\n")
    (checkout / "repvgg.py").write_text(
        "import copy\nfrom se_block import SEBlock\nfrom torch import nn\n"
        "class Net(SEBlock):\n    deploy = False\n    def forward(self, x): return x.mean((2, 3))\n"
        "def create_RepVGG_B1g2(deploy=False): return Net()\n"
        "def repvgg_model_convert(model, save_path=None, do_copy=True): return copy.deepcopy(model)\n"
    )
    (text,) = re.findall(r"checked out as RepVGG:\n\n(.*)", benchmark.EXAMPLES, re.DOTALL)
    adapter = textwrap.dedent(text).splitlines()
    assert adapter[0].startswith("import runpy")
    assert len(adapter) == 4
    (tmp_path / "authors_adapter.py").write_text("\n".join(adapter))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "authors_adapter", raising=False)
    (side,) = peers(["authors_adapter:build"], "authors_adapter:deploy")
    net = side.build("repvgg_b1g2").eval()
    assert type(net).__name__ == "Net"
    assert side.deploy is not None
    require_one_function(side, net, side.deploy(net))


@pytest.mark.skipif(
    not sides.PEERS.is_dir() and importlib.util.find_spec("timm") is None, reason="timm is not here: make peers"
)
def test_timms_forms_are_one_function_and_its_variants_known() -> None:
    (side,) = peers(["timm"], None)
    net = randomize(side.build("repvgg_a0")).eval()
    assert count_parameters(net) == VARIANTS["a0"].train_params
    assert side.deploy is not None
    deployed = side.deploy(net)
    require_one_function(side, net, deployed)
    assert count_parameters(deployed) == VARIANTS["a0"].deploy_params
    assert side.lacks("repvgg_a0") is None
    assert side.lacks("repvgg_b1g2") == "timm has no repvgg_b1g2"


def test_the_function_of_a_network_is_looked_at_without_moving_the_generator() -> None:
    net = tiny().eval()
    before = torch.get_rng_state()
    require_one_function(Side("x", peer.small, None), net, net)
    assert torch.equal(before, torch.get_rng_state())
