"""Two hosts on one machine: network namespaces that a pair of virtual interfaces connects. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

PACKAGES = "apt-get install --no-install-recommends iproute2"


def missing() -> str | None:
    """What keeps two hosts from being made here, and what to do; None if nothing does."""
    if shutil.which("ip") is None:
        return f"no ip here: {PACKAGES}"
    if os.geteuid() != 0:
        return "network namespaces are root's to make: run these tests as root"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    namespace: str
    interface: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """The same on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def link(self, state: str) -> None:
        """Up or down, as when somebody pulls the cable: nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Connected, until the end of the block."""
    # Names of interfaces have 15 characters at most.
    number = os.getpid()
    hosts = tuple(Host(f"repvgg-{number}-{i}", f"v{number}-{i}", f"10.98.0.{i}") for i in (1, 2))
    one, two = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        _ip(
            *("link", "add", one.interface, "netns", one.namespace, "type", "veth"),
            *("peer", "name", two.interface, "netns", two.namespace),
        )
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.link("up")
        yield one, two
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):  # it was not made
                _ip("netns", "delete", host.namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)
