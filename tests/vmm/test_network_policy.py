# SPDX-License-Identifier: Apache-2.0
"""The words of a network policy: what they mean, and what each mistake is told."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import NetConfig, NetworkPolicy
from vmm.config.policy import parse_rule
from vmm.errors import ConfigError
from vmm.sandbox import Sandbox


def whole(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address if ":" in address else f"::ffff:{address}")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("pypi.org", ("pypi.org", 0, 0)),
        ("PyPI.org.", ("pypi.org", 0, 0)),
        ("*.pypi.org:443", ("*.pypi.org", 443, 443)),
        ("*", ("*", 0, 0)),
        ("*:443", ("*", 443, 443)),
        ("bücher.example", ("xn--bcher-kva.example", 0, 0)),
        ("a_b-c.example:8000-8010", ("a_b-c.example", 8000, 8010)),
        ("1e100.net", ("1e100.net", 0, 0)),
        ("10.1.0.0/16", (whole("10.1.0.0"), 112, 0, 0)),
        ("1.2.3.4:443", (whole("1.2.3.4"), 128, 443, 443)),
        ("0.0.0.0/0", (whole("0.0.0.0"), 96, 0, 0)),
        ("10.0.0.0/8:53", (whole("10.0.0.0"), 104, 53, 53)),
        ("2001:db8::/32", (whole("2001:db8::"), 32, 0, 0)),
        ("2001:db8::", (whole("2001:db8::"), 128, 0, 0)),
        ("[2001:db8::1]:443", (whole("2001:db8::1"), 128, 443, 443)),
        ("[2001:db8::/32]:1-65535", (whole("2001:db8::"), 32, 1, 65535)),
        ("[::1]", (whole("::1"), 128, 0, 0)),
    ],
)
def test_rules(text: str, rule: object) -> None:
    assert parse_rule("allow", text) == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a name"),
        ("pypi..org", "must be a name"),
        ("a.*.org", "must be a name"),
        ("*pypi.org", "must be a name"),
        ("https://pypi.org", "port //pypi.org: must be a number"),
        ("pypi.org/simple", "must be a name"),
        ("pypi.org:", "must be a name"),
        ("pypi.org:0", "must be a number from 1 to 65535"),
        ("pypi.org:http", "must be a number"),
        ("pypi.org:65536", "must be a number"),
        ("pypi.org:10-9", "must be a number from 10 to 65535"),
        ("pypi.org:10-", "must be a number"),
        ("x" * 64 + ".org", "must be a name"),
        ("a." * 127 + "org", "must be a name"),
        ("300.1.1.1", "must be a name"),
        ("1.2.3", "must be a name"),
        ("10.0.0.0/33", "must be a number from 0 to 32"),
        ("10.0.0.0/", "must be a number from 0 to 32"),
        ("10.1.2.3/16", "the network is 10.1.0.0/16"),
        ("2001:db8::1/32", "the network is 2001:db8::/32"),
        ("2001:db8::1/129", "must be a number from 0 to 128"),
        ("[10.0.0.1]:80", "must be a name"),
        ("[2001:db8::1", "must be a name"),
        ("[2001:db8::1]x", "must be a name"),
        ("[2001:db8::1]:", "must be a name"),
        ("a b", "must be a name"),
        ("a\0b", "must be a name"),
        ("\ud800.org", "must be a name"),
        ("2001:db8::\0", "must be a name"),
        ("2001:db8::\ud800", "must be a name"),
    ],
)
def test_words_that_are_no_rule(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_rule("allow", text)


@given(st.ip_addresses(), st.integers(0, 32))
def test_networks_as_the_standard_library_has_them(address: ipaddress.IPv4Address, bits: int) -> None:
    network = ipaddress.ip_network((address, bits), strict=False)
    shift = 0 if network.version == 6 else 96
    found = parse_rule("allow", str(network))
    assert found == (whole(str(network.network_address)), bits + shift, 0, 0)
    if network.network_address != address:
        with pytest.raises(ConfigError):
            parse_rule("allow", f"{address}/{bits}")


@given(st.text(max_size=30))
def test_text_of_any_kind(text: str) -> None:
    try:
        parse_rule("allow", text)
    except ConfigError as error:
        assert "\n" not in str(error)


def test_a_policy() -> None:
    policy = NetworkPolicy(["pypi.org", "10.0.0.0/8:443"], deny=["10.1.0.0/16"])
    assert policy.allow == ("pypi.org", "10.0.0.0/8:443")
    assert repr(policy) == "NetworkPolicy(allow=('pypi.org', '10.0.0.0/8:443'), deny=('10.1.0.0/16',))"
    assert NetworkPolicy() == NetworkPolicy([])
    assert NetConfig.parse("user,allow=pypi.org+10.0.0.0/8:443,deny=10.1.0.0/16").policy == policy
    with pytest.raises(TypeError, match="allow must be a list of strings"):
        NetworkPolicy("pypi.org")
    with pytest.raises(ConfigError, match="must be a network"):
        NetworkPolicy(deny=["pypi.org"])


def test_where_a_policy_does_not_go() -> None:
    for words in ("tap=t0,queues=2,allow=pypi.org", "auto,queues=8,allow=pypi.org", "user,loopback,allow=pypi.org"):
        with pytest.raises(ConfigError, match="must be without loopback, and with one pair of queues"):
            NetConfig.parse(words)
    for words in ("tap=t0,allow=pypi.org", "auto,addr=10.0.0.1/24,nat,allow=pypi.org", "fd=3,allow=pypi.org"):
        assert NetConfig.parse(words).policy == NetworkPolicy(["pypi.org"])
    with pytest.raises(ConfigError, match="must be none, user or a NetworkPolicy"):
        Sandbox("busybox", network="host")
