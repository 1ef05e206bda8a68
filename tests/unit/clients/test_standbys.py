"""The further addresses of a coordinator in site.toml."""

from __future__ import annotations

import socket

import pytest
from fedcore_clients.check import _serving

from fedcore.errors import BadInput
from fedcore.identity.preflight import CoordinatorAddress


def test_the_addresses_are_those_of_the_coordinator_then_of_its_standbys():
    found = CoordinatorAddress(coordinator="a:1", standbys=("[::1]:2", "c:3"))
    assert found.addresses == (("a", 1), ("::1", 2), ("c", 3))
    assert CoordinatorAddress(coordinator="a:1").addresses == (("a", 1),)
    with pytest.raises(BadInput, match="standbys: found 'c'"):
        _ = CoordinatorAddress(coordinator="a:1", standbys=("c",)).addresses


def test_check_tests_the_address_that_listens_now():
    with socket.socket() as first, socket.create_server(("127.0.0.1", 0)) as second:
        first.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        closed, open_ = (f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second))
        found = CoordinatorAddress(coordinator=closed, standbys=(open_,))
        assert _serving(found).coordinator == open_
        assert _serving(CoordinatorAddress(coordinator=open_, standbys=(closed,))).coordinator == (
            open_
        )
        nobody = CoordinatorAddress(coordinator=closed, standbys=(closed,))
        assert _serving(nobody) is nobody
