# SPDX-License-Identifier: Apache-2.0
"""Which frames of a guest's leave it: the policy by itself, and before the stream to passt."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio.net_driver import GUEST_MAC, TX, Stream, Vm, ipv4, seconds_left, tcp, udp, verdict_on
from tests.waiting import until
from virtio import spec
from virtio.net._policy import MOST_LEARNED, REASONS, Policy

ME, GATEWAY, RESOLVER = "10.0.2.15", "10.0.2.2", "10.0.2.3"
ME6 = "2001:db8::15"
ICMP_ECHO = b"\x08\0\0\0\0\1\0\1"


def whole(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address if ":" in address else f"::ffff:{address}")


def rule(text: str, first: int = 0, last: int | None = None) -> tuple[bytes, int, int, int]:
    network = ipaddress.ip_network(text)
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    return whole(str(network.network_address)), bits, first, first if last is None else last


def policy(*allow: Any, deny: Any = ()) -> Policy:
    guest, gateway, resolver = (socket.inet_aton(address) for address in (ME, GATEWAY, RESOLVER))
    return Policy(guest, gateway, resolver, [rule(*each) for each in allow], [rule(*each) for each in deny])


def mine(frame_of: Any, *words: Any, **options: Any) -> bytes:
    made: bytes = frame_of(*words, **{"source": ME, **options})
    return made


def ipv6(target: str, payload: bytes, header: int = 6, *, source: str = ME6, hops: int = 64) -> bytes:
    addresses = whole(source) + whole(target)
    return (
        b"\x02" * 6
        + GUEST_MAC
        + b"\x86\xdd"
        + struct.pack(">IHBB", 6 << 28, len(payload), header, hops)
        + addresses
        + payload
    )


def segment(port: int, flags: int = 2) -> bytes:
    return struct.pack(">HHIIBBHHH", 4000, port, 1000, 0, 0x50, flags, 65000, 0, 0)


ALL = policy(("0.0.0.0/0",), ("::/0",))
TAGGED = mine(tcp, "9.9.9.9", 80)
NEIGHBOUR = b"\x87\0\0\0" + bytes(20)
CASES = [
    ("tcp", mine(tcp, "9.9.9.9", 80), "allowed"),
    ("udp", mine(udp, "9.9.9.9", 443), "allowed"),
    ("ping", mine(ipv4, "9.9.9.9", ICMP_ECHO, 1), "allowed"),
    ("no-ping", mine(ipv4, "9.9.9.9", b"\3" + bytes(27), 1), "protocol"),
    ("sctp", mine(ipv4, "9.9.9.9", bytes(20), 132), "protocol"),
    ("icmp6-in-ipv4", mine(ipv4, "9.9.9.9", b"\x80" + bytes(7), 58), "protocol"),
    ("arp", b"\xff" * 6 + GUEST_MAC + b"\x08\x06\0\1\x08\0\6\4\0\1" + bytes(20), "allowed"),
    ("arp-short", b"\xff" * 6 + GUEST_MAC + b"\x08\x06\0\1\x08\0\6\4\0\1" + bytes(19), "malformed"),
    ("arp-other", b"\xff" * 6 + GUEST_MAC + b"\x08\x06\0\6\x08\0\6\4\0\1" + bytes(20), "malformed"),
    ("vlan", TAGGED[:12] + b"\x81\0\0\1" + TAGGED[12:], "protocol"),
    ("802.3", TAGGED[:12] + b"\0\x20" + TAGGED[14:], "protocol"),
    ("nothing", b"", "malformed"),
    ("half", TAGGED[:33], "malformed"),
    ("half-tcp", mine(ipv4, "9.9.9.9", segment(80)[:19]), "malformed"),
    ("half-udp", mine(ipv4, "9.9.9.9", bytes(7), 17), "malformed"),
    ("padded", mine(udp, "9.9.9.9", 443) + bytes(18), "allowed"),
    ("too-long", TAGGED[:16] + b"\0\x29" + TAGGED[18:], "malformed"),
    ("too-short", TAGGED[:16] + b"\0\x13" + TAGGED[18:], "malformed"),
    ("version", TAGGED[:14] + b"\x55" + TAGGED[15:], "malformed"),
    ("header-size", TAGGED[:14] + b"\x44" + TAGGED[15:], "malformed"),
    ("options", mine(tcp, "9.9.9.9", 80, options=b"\x83\7\4\x7f\0\0\1\0"), "options"),
    ("first-fragment", mine(tcp, "9.9.9.9", 80, fragment=0x2000), "fragment"),
    ("later-fragment", mine(tcp, "9.9.9.9", 80, fragment=0x0001), "fragment"),
    ("evil-bit", mine(tcp, "9.9.9.9", 80, fragment=0x8000), "fragment"),
    ("may-fragment", mine(tcp, "9.9.9.9", 80, fragment=0), "allowed"),
    ("spoofed", tcp("9.9.9.9", 80, source="10.0.2.16"), "source"),
    ("from-nobody", tcp("9.9.9.9", 80, source="0.0.0.0"), "source"),
    ("loopback", mine(tcp, "127.0.0.1", 80), "special"),
    ("this-host", mine(tcp, "0.0.0.0", 80), "special"),
    ("gateway", mine(tcp, GATEWAY, 80), "special"),
    ("multicast", mine(udp, "224.0.0.251", 5353), "special"),
    ("broadcast", mine(udp, "255.255.255.255", 9), "special"),
    ("class-e", mine(udp, "240.0.0.1", 9), "special"),
    ("dhcp", udp("255.255.255.255", 67, source="0.0.0.0", source_port=68), "allowed"),
    ("dhcp-again", mine(udp, "255.255.255.255", 67, source_port=68), "allowed"),
    ("dhcp-spoofed", udp("255.255.255.255", 67, source="9.9.9.9", source_port=68), "source"),
    ("no-dhcp", udp("255.255.255.255", 67, source="0.0.0.0", source_port=69), "source"),
    ("dhcp-elsewhere", mine(udp, GATEWAY, 67, source_port=68), "special"),
    ("link-local", mine(tcp, "169.254.169.254", 80), "address"),
    ("resolver", mine(udp, RESOLVER, 53), "resolver"),
    ("resolver-tcp", mine(tcp, RESOLVER, 53), "resolver"),
    ("resolver-spoofed", udp(RESOLVER, 53, source="10.0.2.16"), "source"),
    ("other-resolver", mine(udp, "8.8.8.8", 53), "nameserver"),
    ("other-resolver-tcp", mine(tcp, "8.8.8.8", 53), "nameserver"),
    ("dns-over-tls", mine(tcp, "8.8.8.8", 853), "nameserver"),
    ("tcp6", ipv6("2001:db8::1", segment(80)), "allowed"),
    ("udp6", ipv6("2001:db8::1", bytes(8), 17), "allowed"),
    ("ping6", ipv6("2001:db8::1", b"\x80" + bytes(7), 58), "allowed"),
    ("icmp-in-ipv6", ipv6("2001:db8::1", ICMP_ECHO, 1), "protocol"),
    ("resolver6", ipv6("2001:db8::1", segment(53)), "nameserver"),
    ("neighbour", ipv6("ff02::1:ff00:1", NEIGHBOUR, 58, source="fe80::1", hops=255), "allowed"),
    ("neighbour-of-nobody", ipv6("ff02::1:ff00:1", NEIGHBOUR, 58, source="::", hops=255), "allowed"),
    ("neighbour-here", ipv6("fe80::1", NEIGHBOUR, 58, source="fe80::2", hops=255), "allowed"),
    ("neighbours-afar", ipv6("ff0e::1", NEIGHBOUR, 58, source="fe80::1", hops=255), "special"),
    ("neighbour-routed", ipv6("ff02::1:ff00:1", NEIGHBOUR, 58, source="fe80::1", hops=254), "special"),
    ("redirect", ipv6("ff02::1", b"\x89" + bytes(39), 58, source="fe80::1", hops=255), "special"),
    ("dhcp6", ipv6("ff02::1:2", bytes(30), 17, source="fe80::1"), "special"),
    ("loopback6", ipv6("::1", segment(80)), "special"),
    ("nobody6", ipv6("::", segment(80)), "special"),
    ("mapped", ipv6("::ffff:9.9.9.9", segment(80)), "special"),
    ("compatible", ipv6("::127.0.0.1", segment(80)), "special"),
    ("link-local6", ipv6("fe80::1", segment(80)), "special"),
    ("multicast6", ipv6("ff0e::1", segment(80)), "special"),
    ("spoofed6", ipv6("2001:db8::1", segment(80), source="::1"), "source"),
    ("spoofed-mapped", ipv6("2001:db8::1", segment(80), source="::ffff:9.9.9.9"), "source"),
    ("fragment6", ipv6("2001:db8::1", b"\6" + bytes(7) + segment(80), 44), "fragment"),
    *((f"header-{kind}", ipv6("2001:db8::1", b"\6" + bytes(7) + segment(80), kind), "options")
      for kind in (0, 43, 50, 51, 60, 135)),
    ("no-next", ipv6("2001:db8::1", segment(80), 59), "protocol"),
    ("half6", ipv6("2001:db8::1", segment(80))[:53], "malformed"),
    ("half-tcp6", ipv6("2001:db8::1", segment(80)[:19]), "malformed"),
    ("too-long6", ipv6("2001:db8::1", segment(80))[:-1], "malformed"),
    ("version6", ipv6("2001:db8::1", segment(80)).replace(b"\x86\xdd\x60", b"\x86\xdd\x40"), "malformed"),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "verdict"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_where_everything_is_allowed(frame: bytes, verdict: str) -> None:
    assert verdict_on(ALL, frame) == verdict


def test_neighbours_are_on_the_link() -> None:
    """A host that forwards IPv6 from a tap forwards these, too: to a forbidden address they would carry anything."""
    found = policy(("2001:db8:1::/48",), ("2001:db8:2::/48", 443))
    for kind in (133, 135, 136):
        message = bytes([kind]) + bytes(1000)
        for network, verdict in enumerate(("allowed", "address", "address"), 1):
            assert verdict_on(found, ipv6(f"2001:db8:{network}::1", message, 58, hops=255)) == verdict, (kind, network)
    assert verdict_on(found, ipv6("2001:db8:1::1", b"\x89" + bytes(39), 58, hops=255)) == "protocol"
    assert verdict_on(found, mine(ipv4, "9.9.9.9", b"\x87" + bytes(27), 1)) == "protocol"


def test_where_nothing_is_allowed() -> None:
    nothing = policy()
    for name, frame, verdict in CASES:
        quiet = name.startswith(("arp", "dhcp", "neighbour", "resolver"))
        assert verdict_on(nothing, frame) == (verdict if verdict != "allowed" or quiet else "address"), name


def test_rules() -> None:
    found = policy(
        ("10.1.0.0/16",), ("1.2.3.4/32", 443), ("8.8.8.8/32", 53), ("2001:db8::/32", 8000, 8010), ("169.254.1.0/24",),
        deny=[("10.1.9.0/24",), ("1.0.0.0/8", 22)],
    )  # fmt: skip
    for target, port, verdict in (
        ("10.1.2.3", 1, "allowed"), ("10.0.255.255", 1, "address"), ("10.2.0.0", 1, "address"),
        ("10.1.255.255", 65535, "allowed"), ("10.1.9.1", 1, "address"), ("10.1.2.3", 53, "nameserver"),
        ("1.2.3.4", 443, "allowed"), ("1.2.3.4", 442, "address"), ("1.2.3.4", 22, "address"),
        ("8.8.8.8", 53, "allowed"), ("8.8.8.8", 853, "nameserver"), ("8.8.8.8", 80, "address"),
        ("169.254.1.1", 80, "allowed"), ("169.254.169.254", 80, "address"),
        ("2001:db8::1", 8000, "allowed"), ("2001:db8::1", 8010, "allowed"), ("2001:db8::1", 8011, "address"),
        ("2001:db8::1", 7999, "address"), ("2001:db9::1", 8000, "address"),
    ):  # fmt: skip
        frame = ipv6(target, segment(port)) if ":" in target else mine(tcp, target, port)
        assert verdict_on(found, frame) == verdict, (target, port)
    assert verdict_on(found, mine(ipv4, "10.1.2.3", ICMP_ECHO, 1)) == "allowed"
    assert verdict_on(found, mine(ipv4, "1.2.3.4", ICMP_ECHO, 1)) == "address"  # the rule is for a port
    assert found.allows(whole("1.2.3.4"))
    assert not found.allows(whole("10.1.9.1"))
    counters = found.counters
    assert (counters["allowed"], counters["dropped_address"], counters["dropped_nameserver"]) == (8, 11, 2)
    assert counters["dropped"] == 13
    assert counters["allowed_bytes"] == 5 * 54 + 2 * 74 + 42


def test_what_is_learned_has_its_time() -> None:
    found = policy()
    address, other = "203.0.113.7", "203.0.113.8"
    found.learn([(whole(address), 443, 443, 60), (whole(other), 0, 0, 60)])
    assert verdict_on(found, mine(tcp, address, 443)) == "allowed"
    assert verdict_on(found, mine(tcp, address, 80)) == "address"
    assert verdict_on(found, mine(tcp, other, 80)) == "allowed"
    assert verdict_on(found, mine(udp, other, 53)) == "nameserver"
    assert verdict_on(found, mine(udp, other, 9)) == "allowed"
    found.learn([(whole(address), 443, 443, 10)])  # no shorter than before
    assert [left in (59, 60) for left in seconds_left(found)] == [True, True]
    again = policy()
    again.learn([(whole(address), 443, 443, 0)])
    assert verdict_on(again, mine(tcp, address, 443)) == "address"  # over: nothing new
    for flags in (0x10, 0x12, 0x11, 0x04, 0x18):
        assert verdict_on(again, mine(tcp, address, 443, flags=flags)) == "allowed"  # but what is open goes on
    for flags in (0x02, 0x03, 0x42, 0xC2):
        assert verdict_on(again, mine(tcp, address, 443, flags=flags)) == "address"
    assert verdict_on(again, mine(udp, address, 443)) == "allowed"  # not so long after the last frame
    assert verdict_on(again, mine(tcp, "203.0.113.6", 443, flags=0x10)) == "address"


def test_what_is_denied_is_not_reached_by_a_gateway_from_ipv6() -> None:
    """By NAT64, where the host's network has it."""
    found = policy(("0.0.0.0/0",), ("::/0",), deny=[("10.0.0.0/8",), ("203.0.113.7/32", 22)])
    for target, port, verdict in (
        ("64:ff9b::10.1.2.3", 80, "address"), ("64:ff9b::203.0.113.7", 22, "address"),
        ("64:ff9b::203.0.113.7", 80, "allowed"), ("64:ff9b:1::a01:203", 80, "allowed"),
        ("64:ff9b::169.254.169.254", 80, "address"),
    ):  # fmt: skip
        assert verdict_on(found, ipv6(target, segment(port))) == verdict, (target, port)
    found.learn([(whole("64:ff9b::10.1.2.3"), 0, 0, 60)])
    assert verdict_on(found, ipv6("64:ff9b::10.1.2.3", segment(443))) == "address"
    alone = policy(("64:ff9b::a9fe:a9fe/128",))
    assert verdict_on(alone, ipv6("64:ff9b::169.254.169.254", segment(80))) == "allowed"


def test_no_more_than_so_many_are_learned() -> None:
    found = policy()
    found.learn([(whole("203.0.113.7"), 0, 0, 9)])
    many = [(bytes(10) + b"\xff\xff\x0b\0" + struct.pack(">H", number), 0, 0, 60) for number in range(MOST_LEARNED)]
    found.learn(many)
    assert len(found.learned()) == MOST_LEARNED
    assert found.counters["evicted"] == 1


def test_bad_rules() -> None:
    for words in (([(b"1234", 0, 0, 0)],), ([(bytes(16), 129, 0, 0)],), ([(bytes(16), 0, 70000, 0)],)):
        with pytest.raises((ValueError, OverflowError)):
            Policy(bytes(4), bytes(4), bytes(4), *words)
    with pytest.raises(ValueError, match="16 bytes"):
        policy().learn([(b"1234", 0, 0, 1)])


# Against another reading of the same frames

NETWORKS = ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/25", "10.1.2.3/32", "169.254.0.0/16", "128.0.0.0/1"]
TARGETS = st.one_of(
    st.sampled_from(["10.1.2.3", "10.1.2.128", "10.2.0.0", "127.0.0.1", "169.254.169.254", RESOLVER, GATEWAY]),
    st.integers(0, 2**32 - 1).map(lambda number: str(ipaddress.IPv4Address(number))),
)
RULES = st.lists(st.tuples(st.sampled_from(NETWORKS), st.sampled_from([0, 0, 22, 53, 443])), max_size=5)


def second_opinion(allow: Any, deny: Any, target: str, port: int) -> str:
    address = ipaddress.ip_address(target)
    if target == RESOLVER:
        return "resolver"
    if (
        address.is_loopback
        or address.is_multicast
        or address.is_reserved
        or int(address) >> 24 == 0
        or target == GATEWAY
    ):
        return "special"

    def meets(rule: Any) -> bool:
        return address in ipaddress.ip_network(rule[0]) and rule[1] in (0, port)

    if any(map(meets, deny)):
        return "address"
    for each in filter(meets, allow):
        if address.is_link_local and not ipaddress.ip_network(each[0]).is_link_local:
            continue
        if port not in (53, 853) or each[1] == port:
            return "allowed"
    return "nameserver" if port in (53, 853) else "address"


@settings(max_examples=200, deadline=None)
@given(RULES, RULES, TARGETS, st.sampled_from([1, 22, 53, 443, 853]), st.booleans())
def test_rules_by_another_reading(allow: Any, deny: Any, target: str, port: int, stream: bool) -> None:
    frame = mine(tcp if stream else udp, target, port)
    assert verdict_on(policy(*allow, deny=deny), frame) == second_opinion(allow, deny, target, port)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_of_any_kind(data: Any) -> None:
    """Of any bytes, only a packet to the one allowed address is allowed."""
    found = policy(("9.9.9.9/32", 80))
    frame = bytearray(mine(tcp, "9.9.9.9", 80))
    for _ in range(data.draw(st.integers(0, 4))):
        frame[data.draw(st.integers(12, len(frame) - 1))] = data.draw(st.integers(0, 255))
    del frame[data.draw(st.integers(0, len(frame))) :]
    if verdict_on(found, frame) == "allowed" and frame[12:14] == b"\x08\0" and frame[30:34] != b"\xff" * 4:
        assert frame[14] == 0x45
        assert frame[23] == 6
        assert frame[26:34] == socket.inet_aton(ME) + socket.inet_aton("9.9.9.9")
        assert frame[36:38] == b"\0\x50"
        assert int.from_bytes(frame[20:22], "big") & 0xBFFF == 0
        assert 40 <= int.from_bytes(frame[16:18], "big") <= len(frame) - 14


def test_the_table_changes_under_the_reader() -> None:
    """A writer that never rests; what is always allowed is so for each frame."""
    found = policy(("9.9.9.9/32",))
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            found.learn([(whole(f"203.0.113.{number % 250}"), 0, 0, 60)])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        frames = mine(tcp, "9.9.9.9", 80), mine(tcp, "8.8.8.8", 80)
        for _ in range(5000):
            assert verdict_on(found, frames[0]) == "allowed"
            assert verdict_on(found, frames[1]) == "address"
    finally:
        stop.set()
        thread.join()


# Before a stream


def take(backend: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += backend.other.recv(size - len(data))
    return data


def heard(backend: Any) -> bytes:
    """The next frame that the other end of the cable gets."""
    return take(backend, int.from_bytes(take(backend, 4), "big"))


def test_only_what_is_allowed_leaves(stack: Any) -> None:
    backend = Stream(stack)
    vm = Vm(stack, tap=backend, policy=policy(("9.9.9.9/32", 80)))
    good = mine(tcp, "9.9.9.9", 80)
    for frame in (mine(tcp, "9.9.9.9", 81), good, mine(tcp, "127.0.0.1", 80), good + bytes(3000)):
        vm.send(frame)
    assert heard(backend) == good
    assert heard(backend) == good + bytes(3000)
    until(lambda: vm.device.stats["policy_allowed"] == 2, lambda: vm.device.stats)
    stats = vm.device.stats
    assert (stats["policy_dropped_address"], stats["policy_dropped_special"]) == (1, 1)
    assert stats["policy_allowed_bytes"] == stats["tx_bytes"] == 2 * len(good) + 3000
    assert stats["tx_packets"] == 2


def test_what_was_checked_is_what_is_sent(stack: Any) -> None:
    """The guest rewrites a frame that was checked and waits for room."""
    backend = Stream(stack)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += backend._ours.send(bytes(1))
    vm = Vm(stack, tap=backend, policy=policy(("9.9.9.9/32", 80)))
    vm.offer(4)
    good = mine(tcp, "9.9.9.9", 80) + bytes(20) + b"data"
    ring = vm.driver.queues[TX]
    header, other, buffer = (ring.buffer(data) for data in (bytes(12), mine(tcp, "9.9.9.9", 81), good))
    ring.add([header, other])
    ring.add([header, buffer])
    vm.driver.kick(TX)
    until(lambda: vm.device.stats["policy_dropped"] == 1, lambda: vm.device.stats)
    backend.other.sendall(struct.pack(">I", len(good)) + good)
    vm.receive(lambda frame: frame == good)  # by the same thread, so it is done with what it could send
    vm.ram.write(buffer.addr, mine(tcp, "127.0.0.1", 81) + bytes(20) + b"else")
    take(backend, filled)
    assert heard(backend) == good[:-4] + b"else"  # its data are the guest's
    until(lambda: vm.device.stats["policy_allowed"] == 1, lambda: vm.device.stats)


def test_a_frame_in_more_pieces_than_one_write_takes(stack: Any) -> None:
    backend = Stream(stack)
    vm = Vm(stack, tap=backend, policy=policy(("9.9.9.9/32", 80)))
    frame = mine(tcp, "9.9.9.9", 80) + bytes(range(256)) * 4
    ring = vm.driver.queues[TX]
    for head in (74, 30):
        pieces = [
            bytes(12) + frame[:head],
            *(frame[at : at + 1] for at in range(head, head + 500)),
            frame[head + 500 :],
        ]
        ring.add_indirect([ring.buffer(piece) for piece in pieces if piece])
        vm.driver.kick(TX)
        assert heard(backend) == frame
    assert not vm.log


def on_the_tap(stack: Any, vm: Vm) -> socket.socket:
    """What the host's side of the tap gets, and what it sends itself."""
    seen = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)))
    seen.bind((vm.tap.name, 0))
    seen.settimeout(10)
    return seen  # type: ignore[no-any-return]


def next_frame(seen: socket.socket) -> bytes:
    """What comes next that is not IPv6: the host's kernel greets its neighbours on a new tap."""
    while (frame := seen.recv(4000))[12:14] == b"\x86\xdd":
        pass
    return frame


def test_only_what_is_allowed_gets_to_a_tap(namespace: None, stack: Any) -> None:
    found = Policy(bytes([10, 9, 8, 1]), bytes(4), bytes([10, 0, 2, 3]), [rule("9.9.9.9/32", 80)], guest_bits=24)
    vm = Vm(stack, policy=found)
    seen = on_the_tap(stack, vm)
    for frame in (
        tcp("9.9.9.9", 81), tcp("9.9.9.9", 80, source="10.9.9.2"), tcp("9.9.9.9", 80, source="127.0.0.1"),
        tcp("10.9.8.1", 80), udp("9.9.9.9", 80, source="10.9.8.77"),
    ):  # fmt: skip
        vm.send(frame)
    assert next_frame(seen)[12:] == udp("9.9.9.9", 80, source="10.9.8.77")[12:]
    until(lambda: vm.device.stats["policy_allowed"] == 1, lambda: vm.device.stats)
    stats = vm.device.stats
    assert (stats["policy_dropped_address"], stats["policy_dropped_source"]) == (2, 2)


def test_a_header_changes_nothing_of_what_was_checked(namespace: None, stack: Any) -> None:
    """By a header the kernel would write a checksum at any offset, as over the address that was checked."""
    vm = Vm(stack, policy=policy(("9.9.9.9/32", 80)))
    assert not vm.device.features & (spec.NET_F_CSUM | spec.NET_F_HOST_TSO4 | spec.NET_F_HOST_UFO)
    seen = on_the_tap(stack, vm)
    good = mine(tcp, "9.9.9.9", 80, data=bytes(3000))
    for flags, kind, segment_size, start, offset in ((1, 0, 0, 30, 0), (1, 1, 500, 34, 16), (1, 0x81, 500, 34, 16)):
        vm.send(good, struct.pack("<BBHHHHH", flags, kind, 54, segment_size, start, offset, 0))
        assert next_frame(seen) == good
    pieces = [bytes(5), bytes(7) + good[:20], good[20:70], *(good[at : at + 7] for at in range(70, len(good), 7))]
    ring = vm.driver.queues[TX]
    ring.add_indirect([ring.buffer(piece) for piece in pieces])
    vm.driver.kick(TX)
    assert next_frame(seen) == good
    assert vm.device.stats["tx_errors"] == 0


def test_one_thread_checks(namespace: None, stack: Any) -> None:
    with pytest.raises(ValueError, match="one pair of queues"):
        Vm(stack, queues=2, policy=policy())


@pytest.mark.parametrize("only_special", [True, False])
def test_plain_frames_to_the_host_itself(only_special: bool) -> None:
    """What passt makes connections to the host's own loopback of, whatever the gateway is mapped to."""
    found = Policy(only_special=only_special) if only_special else ALL
    for target in ("127.0.0.1", "127.5.5.5", "0.0.0.0", "0.1.2.3"):
        assert verdict_on(found, mine(tcp, target, 80)) == "special"
    for target in ("::1", "::", "::ffff:127.0.0.1", "::127.0.0.1"):
        assert verdict_on(found, ipv6(target, segment(80))) == "special"
    assert verdict_on(found, mine(tcp, "10.1.2.3", 80)) == "allowed"
    assert verdict_on(found, ipv6("2001:db8::1", segment(80))) == "allowed"
    if only_special:
        for name, frame, _ in CASES:
            assert verdict_on(found, frame) in ("allowed", "special"), name
        assert verdict_on(found, udp("224.0.0.251", 5353)) == "allowed"
        assert verdict_on(found, ipv6("ff02::16", bytes(8), 0, source="::")) == "allowed"


def test_reasons_are_those_of_the_counters() -> None:
    assert {f"dropped_{reason}" for reason in REASONS} <= set(policy().counters)
