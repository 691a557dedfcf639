"""Addresses inside excluded networks, in every way to write them."""

from __future__ import annotations

import ipaddress

import pytest

from hypha.config.models import RESERVED_CIDR
from hypha.config.networks import ExcludedNetworks


@pytest.mark.parametrize(
    ("address", "excluded"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
        ("::1", True),
        ("::ffff:10.1.2.3", True),
        ("::ffff:192.0.2.1", False),
        ("64:ff9b::a01:203", True),
        ("64:ff9b:1::a01:203", True),
        ("64:ff9b::c000:201", False),
        ("2002:a01:203::1", True),
        ("2002:c000:201::1", False),
        ("::10.1.2.3", True),
        ("0.0.0.0", True),
        ("0.1.2.3", True),
        ("::", True),
    ],
)
def test_an_address_is_what_it_leads_to(address: str, excluded: bool) -> None:
    assert ExcludedNetworks(RESERVED_CIDR).holds(ipaddress.ip_address(address)) is excluded


def test_nothing_is_excluded_where_nothing_is_named() -> None:
    assert not ExcludedNetworks().holds(ipaddress.ip_address("::ffff:127.0.0.1"))
    assert not ExcludedNetworks(["10.0.0.0/8"]).holds(ipaddress.ip_address("0.0.0.0"))
