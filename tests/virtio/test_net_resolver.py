# SPDX-License-Identifier: Apache-2.0
"""The guest's nameserver inside the process: messages, what it lets through, and a nameserver that lies."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio.net_driver import TX, Stream, Vm, checksum, ipv4, seconds_left, tcp, udp, verdict_on
from tests.virtio.test_net_policy import ME, RESOLVER, mine, policy, whole
from tests.waiting import until
from virtio._limiter import RateLimiter
from virtio.net import dns, resolver
from virtio.net._policy import REASONS
from virtio.net.resolver import Resolver

A, AAAA = dns.A, dns.AAAA
PUBLIC, OTHER = "203.0.113.7", "203.0.113.8"


def name_bytes(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"


def ask(name: str, kind: int = A, *, number: int = 7, flags: int = 0x0100, class_: int = 1, count: int = 1) -> bytes:
    head = struct.pack(">HHHHHH", number, flags, count, 0, 0, 0)
    return head + (name_bytes(name) + struct.pack(">HH", kind, class_)) * count


def record(name: str, kind: int, data: bytes, ttl: int = 300, class_: int = 1) -> bytes:
    """Of a name; "" is that of the question, which is pointed to."""
    return (name_bytes(name) if name else b"\xc0\x0c") + struct.pack(">HHIH", kind, class_, ttl, len(data)) + data


def reply(query: bytes, *records: bytes, flags: int = 0x8180, number: int | None = None) -> bytes:
    """A nameserver's answer to one of our queries."""
    end = query.index(b"\0", 12) + 5
    head = struct.pack(
        ">HHHHHH", int.from_bytes(query[:2], "big") if number is None else number, flags, 1, len(records), 0, 0
    )
    return head + query[12:end] + b"".join(records)


class Server:
    """A nameserver; `answers` makes each answer, or several, or none."""

    def __init__(self, stack: Any, answers: Callable[[str, int, bytes], bytes | list[bytes]]) -> None:
        self.socket = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.socket.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.socket.getsockname()
        self.asked: list[tuple[str, int]] = []
        self._answers = answers
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        stack.callback(self._end)

    def _serve(self) -> None:
        while data := self.socket.recvfrom(4096):
            query, client = data
            if not query:
                return
            name, at = dns.read_name(query, 12)
            kind = int.from_bytes(query[at : at + 2], "big")
            self.asked.append((name, kind))
            answers = self._answers(name, kind, query)
            for each in [answers] if isinstance(answers, bytes) else answers:
                self.socket.sendto(each, client)

    def _end(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.address)
        self._thread.join()


class Guest:
    """A guest's resolver, and the one it asks."""

    def __init__(
        self, stack: Any, names: Any = (("good.example", 0, 0), ("*.wild.example", 443, 443)), *,
        servers: Any = (), hosts: Any = None, allow: Any = (),
    ) -> None:  # fmt: skip
        self.policy = policy(*allow)
        self.log: list[str] = []
        self.came = threading.Event()
        self.resolver = Resolver(self.policy, socket.inet_aton(RESOLVER), names)
        self.resolver.servers, self.resolver.hosts = list(servers), hosts or {}
        self.resolver.log = lambda kind, line: self.log.append(line)
        self.resolver.on_frame = self.came.set
        stack.callback(self.resolver.close)

    def ask(self, message: bytes) -> tuple[int, list[str]]:
        """The response code and the addresses."""
        return self.read(self.exchange(message), message)

    def exchange(self, message: bytes, **options: Any) -> bytes:
        self.came.clear()
        self.resolver.receive(mine(udp, RESOLVER, 53, message, **options))
        frame = self.resolver.next_frame()
        if frame is None:
            assert self.came.wait(10)
            frame = self.resolver.next_frame()
        assert frame is not None
        return frame

    def read(self, frame: bytes, message: bytes) -> tuple[int, list[str]]:
        assert frame[:14] == b"\x02\x56\0\0\0\2" + b"\x02" * 6 + b"\x08\0"
        assert frame[26:34] == socket.inet_aton(RESOLVER) + socket.inet_aton(ME)
        assert checksum(frame[14:34]) == 0
        segment = frame[34:]
        assert checksum(frame[26:34] + struct.pack(">HH", 17, len(segment)) + segment) == 0
        assert struct.unpack(">HHH", segment[:6]) == (53, 4000, len(segment))
        answer = segment[8:]
        assert len(answer) <= 512
        number, flags, questions, count, _, _ = struct.unpack_from(">HHHHHH", answer)
        assert number == 7
        assert flags & 0x8780 == 0x8180 & 0x8780
        found = by_libresolv(answer)
        assert len(found) == count
        if questions:
            assert answer[12 : len(message)] == message[12:]
        return flags & 15, found


def by_libresolv(message: bytes) -> list[str]:
    """The addresses of a message as glibc reads it."""
    library = ctypes.CDLL("libresolv.so.2")
    state = ctypes.create_string_buffer(256)
    assert library.ns_initparse(message, len(message), state) == 0
    found = []
    for index in range(int.from_bytes(message[6:8], "big")):
        record = ctypes.create_string_buffer(2048)
        assert library.ns_parserr(state, 1, index, record) == 0
        # struct __ns_rr: name[1025], type, class, ttl, rdlength, rdata, each aligned
        kind, size = (int.from_bytes(record.raw[at : at + 2], "little") for at in (1026, 1036))
        data = ctypes.string_at(struct.unpack_from("=Q", record, 1040)[0], size)
        found.append(socket.inet_ntop(socket.AF_INET if kind == A else socket.AF_INET6, data))
    return found


def addresses(*records: tuple[str, int, str]) -> Callable[[str, int, bytes], bytes]:
    """A nameserver with these records."""

    def answer(name: str, kind: int, query: bytes) -> bytes:
        family = {A: socket.AF_INET, AAAA: socket.AF_INET6}
        found = [
            record("", kind, socket.inet_pton(family[kind], text))
            for owner, this, text in records
            if (owner, this) == (name, kind)
        ]
        return reply(query, *found, flags=0x8180 if any(owner == name for owner, _, _ in records) else 0x8183)

    return answer


def test_an_allowed_name_opens_its_addresses(stack: Any) -> None:
    server = Server(stack, addresses(("good.example", A, PUBLIC), ("good.example", AAAA, "2001:db8::7")))
    guest = Guest(stack, servers=[server.address])
    assert verdict_on(guest.policy, mine(tcp, PUBLIC, 80)) == "address"
    assert guest.ask(ask("good.example")) == (0, [PUBLIC])
    assert verdict_on(guest.policy, mine(tcp, PUBLIC, 80)) == "allowed"
    assert verdict_on(guest.policy, mine(tcp, OTHER, 80)) == "address"
    assert guest.ask(ask("Good.EXAMPLE")) == (0, [PUBLIC])  # again: from what is known
    assert guest.ask(ask("good.example", AAAA)) == (0, ["2001:db8::7"])
    assert server.asked == [("good.example", A), ("good.example", AAAA)]
    assert {each[0] for each in guest.policy.learned()} == {whole(PUBLIC), whole("2001:db8::7")}
    assert {*seconds_left(guest.policy)} <= {299, 300}
    assert guest.resolver.counters["answered"] == 3


def test_other_names_do_not_exist(stack: Any) -> None:
    server = Server(stack, addresses(("bad.example", A, PUBLIC)))
    guest = Guest(stack, servers=[server.address])
    for name in (
        "bad.example",
        "example",
        "x.good.example",
        "wild.example",
        "good.example.evil",
        "xwild.example",
        "",
        "-",
    ):
        assert guest.ask(ask(name)) == (dns.NO_SUCH_NAME, []), name
    assert server.asked == []
    assert guest.policy.learned() == []
    assert guest.resolver.counters["refused"] == 8
    assert guest.log[0] == "the policy keeps the guest from the name bad.example"


def test_a_pattern_and_ports(stack: Any) -> None:
    server = Server(stack, addresses(("a.wild.example", A, PUBLIC), ("b.a.wild.example", A, OTHER)))
    guest = Guest(stack, servers=[server.address])
    assert guest.ask(ask("a.wild.example")) == (0, [PUBLIC])
    assert guest.ask(ask("b.a.wild.example")) == (0, [OTHER])
    assert verdict_on(guest.policy, mine(tcp, PUBLIC, 443)) == "allowed"
    assert verdict_on(guest.policy, mine(tcp, PUBLIC, 80)) == "address"
    everything = Guest(stack, [("*", 0, 0)], servers=[server.address])
    assert everything.ask(ask("a.wild.example")) == (0, [PUBLIC])
    assert everything.ask(ask("nowhere.example")) == (dns.NO_SUCH_NAME, [])


def test_what_is_no_question_for_addresses(stack: Any) -> None:
    guest = Guest(stack)
    for kind in (16, 65, 255, 12, 5, 15):
        assert guest.ask(ask("good.example", kind)) == (0, [])
    assert guest.ask(ask("good.example", class_=3)) == (dns.NOT_IMPLEMENTED, [])
    assert guest.ask(ask("good.example", flags=0x2900)) == (dns.NOT_IMPLEMENTED, [])
    assert guest.ask(ask("good.example", count=2)) == (dns.BAD_FORMAT, [])
    assert guest.ask(ask("good.example", count=0)) == (dns.BAD_FORMAT, [])
    assert guest.ask(ask("good.example")[:-1]) == (dns.BAD_FORMAT, [])
    assert guest.ask(ask("x" * 63 + ".good.example"))[0] == dns.NO_SUCH_NAME
    loop = ask("")[:12] + b"\xc0\x0c\0\1\0\1"
    assert guest.ask(loop) == (dns.BAD_FORMAT, [])
    assert guest.ask(ask("")[:12] + b"\4a.b.\0\0\1\0\1") == (dns.BAD_FORMAT, [])  # a dot within a label
    for silent in (b"", b"x" * 11, ask("good.example", flags=0x8100)):
        guest.resolver.receive(mine(udp, RESOLVER, 53, silent))
    guest.resolver.receive(mine(udp, RESOLVER, 54, ask("bad.example")))
    guest.resolver.receive(mine(udp, OTHER, 53, ask("bad.example")))
    guest.resolver.receive(mine(ipv4, RESOLVER, bytes(40), 132))
    guest.resolver.receive(mine(udp, RESOLVER, 53, ask("bad.example"))[:50])
    guest.resolver.receive(mine(udp, RESOLVER, 53, ask("bad.example"), fragment=0x2000))
    assert guest.resolver.next_frame() is None
    assert guest.resolver.counters["bad"] == 15


def test_tcp_is_refused_at_once(stack: Any) -> None:
    guest = Guest(stack)
    frame = mine(tcp, RESOLVER, 53)
    guest.resolver.receive(frame)
    told = guest.resolver.next_frame()
    assert told is not None
    assert told[14 + 9] == 1
    assert told[34:36] == b"\3\3"
    assert checksum(told[34:]) == 0
    assert told[42:] == frame[14:42]


def test_an_address_of_a_network_of_the_hosts_own_is_kept(stack: Any) -> None:
    """Who owns an allowed name does not open the host's networks by it."""
    own = [
        "127.0.0.1",
        "10.0.0.1",
        "172.31.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
    ]
    records = [("good.example", A, text) for text in (*own, PUBLIC)]
    records += [("good.example", AAAA, text) for text in ("::1", "fd00::1", "fe80::1", "::ffff:127.0.0.1", "::")]
    # By a gateway from IPv6 to IPv4 (NAT64), where the host has one.
    public = "64:ff9b::cb00:7107"
    gateways = ("64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::cb00:7107", public)
    records += [("good.example", AAAA, text) for text in gateways]
    server = Server(stack, addresses(*records))
    guest = Guest(stack, servers=[server.address])
    assert guest.ask(ask("good.example")) == (0, [PUBLIC])
    assert guest.ask(ask("good.example", AAAA)) == (0, [public])
    assert sorted(each[0] for each in guest.policy.learned()) == sorted(map(whole, (PUBLIC, public)))
    assert guest.resolver.counters["own"] == 16
    both = Guest(stack, servers=[server.address], allow=[("10.0.0.0/8", 443), ("192.168.1.1/32",)])
    assert both.ask(ask("good.example")) == (0, ["10.0.0.1", "192.168.1.1", PUBLIC])
    assert verdict_on(both.policy, mine(tcp, "10.0.0.1", 443)) == "allowed"
    assert verdict_on(both.policy, mine(tcp, "10.0.0.1", 80)) == "address"  # the name opens no more than the rule


def own_address() -> str:
    """One of this host's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.200", 9))
        found: str = route.getsockname()[0]
        return found


def without(family: int, number: int = errno.EAFNOSUPPORT) -> Any:
    """The module of sockets, which makes none of that family."""

    def made(this: int, *how: Any) -> Any:
        if this == family:
            raise OSError(number, os.strerror(number))
        return socket.socket(this, *how)

    return types.SimpleNamespace(**vars(socket) | {"socket": made})


def test_an_address_of_this_host_is_kept(stack: Any) -> None:
    """One of a public network, too."""
    here = own_address()
    server = Server(stack, addresses(("good.example", A, here), ("good.example", A, PUBLIC)))
    guest = Guest(stack, servers=[server.address])
    assert guest.ask(ask("good.example")) == (0, [PUBLIC])
    assert guest.resolver.counters["own"] == 1
    allowed = Guest(stack, servers=[server.address], allow=[(f"{here}/32", 80)])
    assert allowed.ask(ask("good.example")) == (0, [here, PUBLIC])
    known = Guest(stack, hosts={"good.example": [socket.inet_aton(here)]})  # its administrator says so
    assert known.ask(ask("good.example")) == (0, [here])


@pytest.mark.parametrize("has_ipv6", [True, False])
def test_an_ipv4_address_of_this_host_in_ipv6_is_kept(
    stack: Any, monkeypatch: pytest.MonkeyPatch, *, has_ipv6: bool
) -> None:
    """As ::ffff:A.B.C.D it is the same to the policy, and a gateway's way to it leads here, too."""
    here = own_address()
    ways = [("good.example", AAAA, network + here) for network in ("::ffff:", "64:ff9b::")]
    server = Server(stack, addresses(*ways, ("good.example", AAAA, "2001:db8::7")))
    guest = Guest(stack, servers=[server.address])
    if not has_ipv6:
        monkeypatch.setattr(resolver, "socket", without(socket.AF_INET6))
    assert guest.ask(ask("good.example", AAAA)) == (0, ["2001:db8::7"])
    assert verdict_on(guest.policy, mine(tcp, here, 80)) == "address"


@pytest.mark.parametrize(("number", "found"), [(errno.EAFNOSUPPORT, ["2001:db8::7"]), (errno.EMFILE, [])])
def test_a_host_that_has_no_socket_for_an_address(
    stack: Any, monkeypatch: pytest.MonkeyPatch, number: int, found: list[str]
) -> None:
    """Without IPv6 (ipv6.disable=1) the address is nobody's here; without a descriptor nobody knows. Both go on."""
    server = Server(stack, addresses(("good.example", A, PUBLIC), ("good.example", AAAA, "2001:db8::7")))
    guest = Guest(stack, servers=[server.address])

    monkeypatch.setattr(resolver, "socket", without(socket.AF_INET6, number))
    assert guest.ask(ask("good.example", AAAA)) == (0, found)
    assert guest.ask(ask("good.example", A)) == (0, [PUBLIC])


def test_aliases(stack: Any) -> None:
    def answer(name: str, kind: int, query: bytes) -> bytes:
        return reply(
            query,
            record("other.example", A, socket.inet_aton("203.0.113.99")),
            record("good.example", 5, name_bytes("cdn.example"), 100),
            record("cdn.example", 5, name_bytes("edge.example"), 80),
            record("edge.example", A, socket.inet_aton(PUBLIC), 200),
            record("edge.example", A, socket.inet_aton(OTHER), 90),
            record("good.example", A, socket.inet_aton("203.0.113.98"), class_=3),
        )

    guest = Guest(stack, servers=[Server(stack, answer).address])
    frame = guest.exchange(ask("good.example"))
    assert guest.read(frame, ask("good.example")) == (0, [PUBLIC, OTHER])
    assert int.from_bytes(frame[-10:-6], "big") == 80  # the least of the chain's
    assert {*seconds_left(guest.policy)} <= {79, 80}


def test_an_alias_that_leads_to_itself(stack: Any) -> None:
    def answer(name: str, kind: int, query: bytes) -> bytes:
        return reply(
            query,
            record("good.example", 5, name_bytes("b.example")),
            record("b.example", 5, name_bytes("good.example")),
        )

    assert Guest(stack, servers=[Server(stack, answer).address]).ask(ask("good.example")) == (0, [])


def test_answers_that_are_not_the_answer(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number, another question, a question itself, half a message: it waits for the right one."""

    def answer(name: str, kind: int, query: bytes) -> list[bytes]:
        bad = record(name, A, socket.inet_aton(OTHER))
        other = ask("evil.example")
        number = int.from_bytes(query[:2], "big")
        return [
            b"", b"x", reply(query, bad, number=number ^ 1), reply(other, bad, number=number), query,
            reply(ask(name, AAAA), bad, number=number), reply(query, bad)[:-1], reply(query, bad[:20]),
            reply(query, record(name, A, socket.inet_aton(PUBLIC))),
        ]  # fmt: skip

    guest = Guest(stack, servers=[Server(stack, answer).address])
    assert guest.ask(ask("good.example")) == (0, [PUBLIC])
    assert [each[0] for each in guest.policy.learned()] == [whole(PUBLIC)]
    assert guest.resolver.counters["upstream_bad"] == 8


def test_a_nameserver_that_is_silent_refuses_or_is_not_there(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "PATIENCE", 0.05)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = nobody.getsockname()
    silent = Server(stack, lambda *_: [])
    refuses = Server(stack, lambda name, kind, query: reply(query, flags=0x8185))
    good = Server(stack, addresses(("good.example", A, PUBLIC)))
    for first in (closed, silent.address, refuses.address, ("no address", 53), ("2001:db8::1", 53)):
        guest = Guest(stack, servers=[first, good.address])
        assert guest.ask(ask("good.example")) == (0, [PUBLIC]), first
    for servers in ([closed], [silent.address], [refuses.address], []):
        guest = Guest(stack, servers=servers)
        assert guest.ask(ask("good.example")) == (dns.FAILED, [])
        assert guest.resolver.counters["failed"] == 1
    assert len(silent.asked) == 1 + resolver.TRIES


@pytest.mark.parametrize("code", [1, 4])
@pytest.mark.parametrize("whole", [True, False])
def test_a_nameserver_that_knows_no_edns(stack: Any, code: int, whole: bool) -> None:
    """As many a router: it refuses the format, with the question or without, and is asked in the plain one."""

    def answer(name: str, kind: int, query: bytes) -> bytes:
        if query[11]:  # additional records
            refusal = reply(query, flags=0x8180 | code)
            return refusal if whole else refusal[:4] + bytes(8)
        return reply(query, record("", kind, socket.inet_aton(PUBLIC)))

    guest = Guest(stack, servers=[Server(stack, answer).address])
    assert guest.ask(ask("good.example")) == (0, [PUBLIC])
    assert guest.resolver.counters["upstream"] == 2


def test_many_addresses_and_a_long_name(stack: Any) -> None:
    name = ".".join(["x" * 49] * 4) + ".wild.example"
    many = [f"203.0.113.{number}" for number in range(100)]
    server = Server(stack, addresses(*((each, A, text) for each in (name, "good.example") for text in many)))
    guest = Guest(stack, servers=[server.address])
    code, found = guest.ask(ask("good.example"))
    assert (code, found) == (0, many[:30])
    assert len(guest.policy.learned()) == 30  # what the guest was not told it does not reach
    code, found = guest.ask(ask(name))
    assert found == many[:17]


def test_a_flood_is_bounded_and_told(stack: Any) -> None:
    server = Server(stack, lambda *_: [])
    guest = Guest(stack, servers=[server.address])
    for number in range(200):
        guest.resolver.receive(mine(udp, RESOLVER, 53, ask(f"x{number}.wild.example")))
    for _ in range(50):
        guest.resolver.receive(mine(udp, RESOLVER, 53, ask("x0.wild.example")))
    assert guest.resolver.counters["limited"] == 200 - resolver.MAX_PENDING + 50 - (resolver.MAX_CLIENTS - 1)
    frame = guest.resolver.next_frame()
    assert frame is not None
    assert frame[45] & 15 == dns.FAILED
    until(lambda: len(server.asked) == resolver.MAX_PENDING)


def test_several_that_ask_the_same_are_answered_by_one(stack: Any) -> None:
    go = threading.Event()

    def answer(name: str, kind: int, query: bytes) -> bytes:
        assert go.wait(10)
        return reply(query, record(name, A, socket.inet_aton(PUBLIC)))

    server = Server(stack, answer)
    guest = Guest(stack, servers=[server.address])
    for _ in range(3):
        guest.resolver.receive(mine(udp, RESOLVER, 53, ask("good.example")))
    go.set()
    assert guest.came.wait(10)
    frames = [guest.resolver.next_frame() for _ in range(4)]
    assert [frame is not None for frame in frames] == [True, True, True, False]
    assert len(server.asked) == 1


def test_the_hosts_own_file(stack: Any) -> None:
    guest = Guest(stack, hosts={"good.example": [socket.inet_aton(PUBLIC), socket.inet_aton("127.0.0.1")]})
    assert guest.ask(ask("good.example")) == (0, [PUBLIC])
    assert guest.ask(ask("good.example", AAAA)) == (0, [])


def test_a_copy_goes_on_with_what_was_learned(stack: Any) -> None:
    server = Server(stack, addresses(("good.example", A, PUBLIC), ("a.wild.example", A, OTHER)))
    guest = Guest(stack, servers=[server.address])
    assert guest.ask(ask("good.example")) == (0, [PUBLIC])
    assert guest.ask(ask("a.wild.example")) == (0, [OTHER])
    copy = Guest(stack, [("good.example", 443, 443)])  # whose policy is another one
    copy.resolver.restore(guest.resolver.save())
    assert verdict_on(copy.policy, mine(tcp, PUBLIC, 443)) == "allowed"
    assert verdict_on(copy.policy, mine(tcp, PUBLIC, 80)) == "address"
    assert verdict_on(copy.policy, mine(tcp, OTHER, 443)) == "address"
    with pytest.raises(ValueError, match="no such addresses"):
        copy.resolver.restore([("good.example", A, [b"12345"], 9)])


def test_a_copy_on_another_host_does_not_reach_that_host(stack: Any) -> None:
    """What a nameserver said was no address of the first one's."""
    here = own_address()
    state = [("good.example", A, [socket.inet_aton(here), socket.inet_aton(PUBLIC)], 100)]
    copy = Guest(stack)
    copy.resolver.restore(state)
    assert verdict_on(copy.policy, mine(tcp, here, 443)) == "address"
    assert verdict_on(copy.policy, mine(tcp, PUBLIC, 443)) == "allowed"
    known = Guest(stack, hosts={"good.example": [socket.inet_aton(here)]})
    known.resolver.restore(state)
    assert verdict_on(known.policy, mine(tcp, here, 443)) == "allowed"


def test_a_copy_of_who_has_asked_for_much_is_not_held_up(stack: Any) -> None:
    copy = Guest(stack, [("*", 0, 0)])
    addresses = [[bytes([203, number >> 8, number & 255, which]) for which in range(4)] for number in range(1000)]
    began = time.process_time()
    copy.resolver.restore((f"n{number}.example", A, each, 100 + number) for number, each in enumerate(addresses))
    assert time.process_time() - began < 2
    assert len(copy.policy.learned()) == 4000


def test_word_of_a_dropped_frame(stack: Any) -> None:
    guest = Guest(stack)
    address, special = REASONS.index("address"), REASONS.index("special")
    frame = mine(tcp, "9.9.9.9", 80).ljust(74, b"\0")
    guest.resolver.refused(frame, address)
    told = guest.resolver.next_frame()
    assert told is not None
    assert told[26:34] == socket.inet_aton("9.9.9.9") + socket.inet_aton(ME)
    assert told[34:36] == b"\3\15"
    guest.resolver.refused(mine(tcp, "127.0.0.1", 80).ljust(74, b"\0"), special)
    assert guest.resolver.next_frame() is None
    assert guest.log == [
        "the policy keeps the guest from 9.9.9.9 port 80 (TCP): not allowed",
        "the policy keeps the guest from 127.0.0.1 port 80 (TCP): an address of no network",
    ]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_messages_of_any_kind(data: Any) -> None:
    """A message, and an answer, with some bytes changed: an answer, or one error."""
    good = record("good.example", 5, b"\xc0\x0c") + record("good.example", A, socket.inet_aton(PUBLIC))
    query = dns.query(7, "good.example", A)
    for message, read in (
        (bytearray(ask("good.example")), lambda data: dns.read_question(data)),
        (bytearray(reply(query, good)), lambda data: dns.read_answer(data, 7, "good.example", A)),
    ):
        for _ in range(data.draw(st.integers(0, 5))):
            message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
        del message[data.draw(st.integers(0, len(message))) :]
        with contextlib.suppress(ValueError, struct.error):
            read(bytes(message))


def test_our_queries_are_what_glibc_reads() -> None:
    message = dns.query(7, "good.example", AAAA)
    state = ctypes.create_string_buffer(256)
    assert ctypes.CDLL("libresolv.so.2").ns_initparse(message, len(message), state) == 0
    made = ctypes.create_string_buffer(512)
    size = ctypes.CDLL("libresolv.so.2").res_mkquery(0, b"good.example", 1, AAAA, None, 0, None, made, 512)
    assert made.raw[12:size] == message[12:-11]


def test_files_of_the_host(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = (
        "# no\nsearch x\nnameserver 192.0.2.53\nnameserver\nnameserver fe80::1%lo\nnameserver 2001:db8::53 # x\n"
        "nameserver dns.example\nnameserver 192.0.2.1,192.0.2.2\nnameserver fe80::1%nosuch\nnameserver fe80::1%7\n"
        "nameserver 192.0.2.1%lo\nnameserver fe80::1%\nnameserver fe80::1%" + "9" * 30 + "\n"
    )
    hosts = "127.0.0.1 localhost\n\n::1 localhost ip6\nbad x\n203.0.113.7 Good.Example good\n"
    lines = {"/etc/resolv.conf": servers, "/etc/hosts": hosts}
    for path in lines:
        tmp_path.joinpath(path.replace("/", "")).write_text(lines[path])
    real = dns._lines
    monkeypatch.setattr(dns, "_lines", lambda path: real(str(tmp_path / path.replace("/", ""))))
    lo = socket.if_nametoindex("lo")
    assert dns.nameservers() == [
        ("192.0.2.53", 53), ("fe80::1", 53, 0, lo), ("2001:db8::53", 53), ("fe80::1", 53, 0, 7),
    ]  # fmt: skip
    assert dns.host_names()["localhost"] == [socket.inet_aton("127.0.0.1"), whole("::1")]
    assert dns.host_names()["good.example"] == [socket.inet_aton(PUBLIC)]
    (tmp_path / "etcresolv.conf").unlink()
    assert dns.nameservers() == [("127.0.0.1", 53)]


# Through the device


@pytest.fixture
def served(stack: Any) -> Iterator[tuple[Vm, Guest]]:
    server = Server(stack, addresses(("good.example", A, PUBLIC)))
    guest = Guest(stack, servers=[server.address])
    vm = Vm(stack, tap=Stream(stack), policy=guest.policy, resolver=guest.resolver)
    vm.offer()
    yield vm, guest


def test_a_guest_asks_and_reaches_what_it_was_told(served: Any) -> None:
    vm, guest = served
    vm.send(mine(tcp, PUBLIC, 80))  # dropped, and told
    header, frame = vm.receive(lambda frame: frame[23] == 1)
    assert frame[34:36] == b"\3\15"
    for name, answer in (("good.example", (0, [PUBLIC])), ("bad.example", (dns.NO_SUCH_NAME, []))):
        vm.send(mine(udp, RESOLVER, 53, ask(name)))
        header, frame = vm.receive(lambda frame: frame[23] == 17)
        assert header == bytes(10) + b"\1\0"
        assert guest.read(frame, ask(name)) == answer
    vm.send(mine(tcp, PUBLIC, 80))
    assert vm.tap.other.recv(4096)[4:] == mine(tcp, PUBLIC, 80)
    stats = vm.device.stats
    assert (stats["dns_asked"], stats["dns_refused"], stats["policy_resolver"]) == (2, 1, 2)
    assert (stats["policy_dropped_address"], stats["resolver_errors"]) == (1, 0)
    assert vm.log == [
        "the policy keeps the guest from 203.0.113.7 port 80 (TCP): not allowed",
        "the policy keeps the guest from the name bad.example",
    ]


def test_an_answer_is_not_lost_where_the_device_sets_its_timer(stack: Any) -> None:
    server = Server(stack, lambda name, kind, query: reply(query, record("", A, socket.inet_aton(PUBLIC), ttl=0)))
    guest = Guest(stack, servers=[server.address])
    limiter = RateLimiter(ops=(1, 0, 3_600_000))
    vm = Vm(stack, tap=Stream(stack), policy=guest.policy, resolver=guest.resolver, tx_limiter=limiter)
    vm.offer()
    question = mine(udp, RESOLVER, 53, ask("good.example"))
    vm.send(question)
    vm.receive(lambda frame: frame[23] == 17)
    for _ in range(2):
        vm.send(mine(tcp, PUBLIC, 80))
    until(lambda: limiter.throttled)
    ended = threading.Event()

    def kick() -> None:
        while not ended.is_set():
            os.eventfd_write(vm.transport.notify_fds[TX], 1)

    kicks = threading.Thread(target=kick)
    kicks.start()
    try:
        for _ in range(200):
            guest.resolver.receive(question)
            vm.receive(lambda frame: frame[23] == 17)
    finally:
        ended.set()
        kicks.join()


def test_a_storm_of_dropped_frames_is_told_in_part(served: Any) -> None:
    vm, _ = served
    ring = vm.driver.queues[1]
    header, frame = ring.buffer(bytes(12)), ring.buffer(mine(tcp, "9.9.9.9", 80))
    for _ in range(4):
        dropped = vm.device.stats["policy_dropped"] + 200  # before: a thread that polls needs no notification
        for _ in range(200):
            ring.add([header, frame])
        vm.driver.kick(1)
        until(
            lambda: vm.device.stats["policy_dropped"] == dropped,  # noqa: B023
            lambda: vm.device.stats,
        )
        ring.reap()
    assert 1 <= vm.device.stats["rx_packets"] <= 64  # not one a frame
    assert len(vm.log) <= 10


def test_a_driver_that_begins_anew_gets_no_answers_of_before(served: Any) -> None:
    vm, guest = served
    vm.bring_up()  # with no buffers
    for _ in range(20):
        vm.send(mine(udp, RESOLVER, 53, ask("bad.example", number=8)))
    until(lambda: guest.resolver.counters["refused"] == 20)
    vm.bring_up()
    vm.offer()
    vm.send(mine(udp, RESOLVER, 53, ask("good.example")))
    _, frame = vm.receive(lambda frame: frame[23] == 17)
    assert guest.read(frame, ask("good.example")) == (0, [PUBLIC])
