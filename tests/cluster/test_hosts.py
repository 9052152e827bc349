"""Two hosts, one rank on each, gloo between them; and the cable that somebody pulls."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.commands import TRAIN, assert_same_training, begun, only_run, record, small, start, wait_until
from support.hosts import Host

pytestmark = [pytest.mark.slow, pytest.mark.netns]
LOST = 76


def on_both(hosts: Sequence[Host], overrides: Sequence[str], logs: Path) -> list[subprocess.Popen[bytes]]:
    return [
        start(
            host.command([*TRAIN, *overrides]),
            logs / f"{rank}.log",
            MASTER_ADDR=hosts[0].address,
            MASTER_PORT="29555",
            NODE_RANK=str(rank),
            GLOO_SOCKET_IFNAME=host.interface,
        )
        for rank, host in enumerate(hosts)
    ]


def ended(ranks: Sequence[subprocess.Popen[bytes]], timeout: float) -> list[int]:
    """Exit codes."""
    try:
        return [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_cut_connection_ends_both_sides_and_the_command_goes_on(
    two_hosts: tuple[Host, Host], digits: Path, tmp_path: Path
) -> None:
    overrides = small(digits, tmp_path, "trainer.num_nodes=2", "ddp_timeout_s=10", epochs=4)
    ranks = on_both(two_hosts, overrides, tmp_path)
    wait_until(lambda: begun(tmp_path), "the first epoch", 90)
    two_hosts[1].link("down")
    assert ended(ranks, 60) == [LOST, LOST]
    run = only_run(tmp_path)
    for rank in (0, 1):
        (line,) = re.findall(r"^error: .*$", (tmp_path / f"{rank}.log").read_text(), re.MULTILINE)
        assert line.startswith(f"error: rank {rank} of 2 ")
        assert "has lost the others" in line
        assert f"{run}: the same command goes on" in line
        assert "Traceback" not in (tmp_path / f"{rank}.log").read_text()
    assert record(run)["status"] == "failed"

    two_hosts[1].link("up")
    assert ended(on_both(two_hosts, overrides, tmp_path), 120) == [0, 0]
    assert "goes on in epoch" in (tmp_path / "0.log").read_text()
    assert record(run)["status"] == "finished"
    assert record(run)["config"]["world_size"] == 2

    # As if nobody had touched the cable.
    again = tmp_path / "again"
    again.mkdir()
    whole = small(digits, again, "trainer.num_nodes=2", epochs=4)
    assert ended(on_both(two_hosts, whole, again), 120) == [0, 0]
    assert_same_training(run, only_run(again))


def test_a_second_host_that_is_not_there_is_an_error(
    two_hosts: tuple[Host, Host], digits: Path, tmp_path: Path
) -> None:
    overrides = small(digits, tmp_path, "trainer.num_nodes=2", "ddp_timeout_s=5")
    first, second = on_both(two_hosts, overrides, tmp_path)
    second.kill()
    second.wait()
    (code,) = ended([first], 90)
    assert code == LOST
    assert "error: rank 0 of 2 " in (tmp_path / "0.log").read_text()
