"""A Slurm of two nodes, and two hosts, where this machine allows them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import hosts
from support import slurm as slurms


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurms.Slurm]:
    if reason := slurms.missing():
        pytest.skip(reason)
    with slurms.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def two_hosts() -> Iterator[tuple[hosts.Host, hosts.Host]]:
    if reason := hosts.missing():
        pytest.skip(reason)
    with hosts.two_hosts() as made:
        yield made
