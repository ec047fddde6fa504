"""For all tests: nothing reaches for the network, and each is in the quick lane or in the full matrix alone."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything asks for it; also in the programs that tests start
_asked: list[str] = []  # where connections were asked for, in case somebody swallowed the error


class NetworkError(RuntimeError):
    """Something reached for another machine."""


def is_here(host: Any) -> bool:
    """Whether a host name or address is of this machine."""
    if host in (None, "", b"", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse(host: Any) -> None:
    if not is_here(host):
        _asked.append(str(host))
        raise NetworkError(f"a test reached for {host}; tests run without a network")


def pytest_configure() -> None:
    """Let sockets reach this machine only."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(host)
        return look_up(host, *args, **kwargs)

    socket.getaddrinfo = getaddrinfo
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))


def _guarded(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse(address[0])
        return connect(self, address)

    return guarded


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Fail a test that reached for the network, even if what it called went on without."""
    before = len(_asked)
    yield
    assert _asked[before:] == []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `full` what repeats a test on further families or towers, as `quick` all that isn't `full`.

    What runs on a family of tests/zoo, or repeats a test on a tower that is much like others, is `zoo`, too.
    """
    first: dict[tuple[str, str], Any] = {}  # by test and method
    own, further = _rows()
    pairs = [getattr(sys.modules.get(name), "PAIRS", {}) for name in ("matrix", "towers")]
    known = {**further, **own, **pairs[0], **pairs[1]}
    towers = getattr(sys.modules.get("towers"), "FURTHER", [])
    for item in items:
        family, method = _family(item, known)
        test = item.nodeid.partition("[")[0]
        is_first = family is None or first.setdefault((test, method), family) is family
        if not is_first:
            item.add_marker(pytest.mark.full)
        if getattr(family, "key", None) in further or (not is_first and any(family is each for each in towers)):
            item.add_marker(pytest.mark.zoo)
        if item.get_closest_marker("full") is None:
            item.add_marker(pytest.mark.quick)


def _rows() -> tuple[dict[str, Any], dict[str, Any]]:
    """The families of tests/tiny.py and the further ones of tests/zoo by their keys."""
    tiny = sys.modules.get("tiny")
    own = {row.key: row for row in (*tiny.ALL, *tiny.WINDOWED)} if tiny else {}
    zoos = [module for name, module in sys.modules.items() if name.startswith("zoo.")]
    rows = [row for module in zoos for row in getattr(module, "ROWS", ())]
    return own, {row.key: row for row in rows if row.key not in own}


def _family(item: pytest.Item, known: dict[str, Any]) -> tuple[Any, str]:
    """The family or tower that a test is run on, of several, and what tells the methods it is run with apart."""
    for value in getattr(getattr(item, "callspec", None), "params", {}).values():
        case = known.get(value, value) if isinstance(value, str) else value
        if type(case).__name__ == "TinyFamily":
            return case, ""
        place = getattr(case, "tower", None) or getattr(case, "family", None)
        if place is not None:
            return place, repr(getattr(case, "methods", None) or getattr(case, "method", None))
    return None, ""
