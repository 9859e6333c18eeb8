# SPDX-License-Identifier: Apache-2.0
"""A guest's nameserver inside this process. It turns a policy of names (``virtio.net._policy``) into addresses.

A thread looks up an allowed name with the host's nameservers. From then on the guest may reach its addresses. Any other
name does not exist. Addresses of this host and of private networks are left out unless a rule allows them, so that the
owner of a name cannot open them. The nameserver also tells the guest, and the log, of dropped frames.

Sources: RFC 6890 (special addresses), RFC 6052 and RFC 8215 (IPv4 addresses in IPv6).
"""

from __future__ import annotations

import _socket as socket  # which imports more
import errno
import os
import select
import struct
import threading
import time
from _collections import deque  # type: ignore[import-not-found]  # `collections` takes long to import

from virtio.net import dns, frames
from virtio.net._policy import REASONS, Policy
from vmm import threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    Client = tuple[bytes, int]  # the headers of a question's frame, and its source port
    Name = tuple[str, int, int]  # a name or a pattern, and ports

MAX_PENDING = 64  # names that are being asked for
MAX_CLIENTS = 16  # that wait for the same name
MAX_FRAMES = 256  # for the guest
MAX_KNOWN = 1024
TRIES = 3
PATIENCE = 1.5  # seconds for an answer; a guest's own resolver waits 5
LEAST, LONGEST = 60, 86400  # seconds that new connections to what a name has are allowed
# Addresses of networks that are somebody's own: they are reached by rules for them alone.
_OWN = Policy(
    allow=[(socket.inet_pton(socket.AF_INET6, address), bits, 0, 0) for address, bits in (
        ("::ffff:0.0.0.0", 104), ("::ffff:10.0.0.0", 104), ("::ffff:100.64.0.0", 106), ("::ffff:127.0.0.0", 104),
        ("::ffff:169.254.0.0", 112), ("::ffff:172.16.0.0", 108), ("::ffff:192.0.0.0", 120),
        ("::ffff:192.168.0.0", 112), ("::ffff:198.18.0.0", 111), ("::ffff:224.0.0.0", 99), ("::", 96),
        ("64:ff9b:1::", 48), ("fc00::", 7), ("fe80::", 10), ("fec0::", 10), ("ff00::", 8),
    )]
)  # fmt: skip
_NAT64 = bytes.fromhex("0064ff9b") + bytes(8)  # RFC 6052: behind it is an IPv4 address, which a gateway translates to


class _Asked:
    # A name that a nameserver is asked for, and who waits for it.

    def __init__(self, name: str, kind: int) -> None:
        self.name = name
        self.kind = kind
        self.clients: list[tuple[Client, dns.Question]] = []
        self.tries = 0
        self.plain = False  # it was asked with EDNS, and a nameserver does not know that
        self.number = 0
        self.socket: socket.socket | None = None
        self.deadline = 0.0


class Resolver:
    """The nameserver of one guest, at an IPv4 address of its own.

    :param policy: is told what names have; owned
    :param address: four bytes
    :param names: the allowed ones, as ``("pypi.org", 443, 443)`` or ``("*.pypi.org", 0, 0)``: with their ports, 0 for
        all; ``*`` is any name, ``*.`` any name below
    :raises OSError: no file descriptor is left

    ``servers`` and ``hosts`` are those of the host's /etc/resolv.conf and /etc/hosts. ``log`` takes a line of a kind.
    ``on_frame`` is called by the thread when there is a frame for the guest, which ``next_frame`` gives. All else may
    be called by any thread.
    """

    what = "resolver"

    def __init__(self, policy: Policy, address: bytes, names: Sequence[Name]) -> None:
        self.policy = policy
        self.address = address
        self.counters = dict.fromkeys(
            ("asked", "answered", "refused", "failed", "bad", "limited", "own", "upstream", "upstream_bad"), 0
        )
        self.on_frame: Callable[[], object] = lambda: None
        self.log: Callable[[str, str], None] = lambda kind, line: None
        self._names = list(names)
        self.servers = dns.nameservers()
        self.hosts = dns.host_names()
        self._lock = threading.Lock()
        self._frames: deque[bytes] = deque(maxlen=MAX_FRAMES)
        # By name and kind: addresses, and until when they may be told again, and reached.
        self._known: dict[tuple[str, int], tuple[list[bytes], float, float]] = {}
        self._asked: dict[tuple[str, int], _Asked] = {}
        self._closing = False
        self._identity = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        if names:
            self._thread = threads.spawn("resolver", "resolver", self._serve)

    def close(self) -> None:
        """End the thread; idempotent."""
        if self._wake < 0:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake)
        self._wake = -1

    def ports(self, name: str) -> list[tuple[int, int]]:
        """The ports that a name is allowed with; empty: it is not allowed."""
        return [(first, last) for pattern, first, last in self._names if _fits(name, pattern)]

    # From the network device

    def reset(self) -> None:
        """Forget the frames for the driver before."""
        with self._lock:
            self._frames.clear()

    def next_frame(self) -> bytes | None:
        """A frame for the guest to receive; None if no frame waits."""
        with self._lock:
            return self._frames.popleft() if self._frames else None

    def receive(self, frame: bytes, *, partial: bool = False) -> None:
        """Take a frame of the guest's to our address; what is not a question is dropped.

        :param frame: whole, from its Ethernet header; the guest cannot change it any more
        :param partial: has no effect here: a question's checksum is not looked at
        """
        with self._lock:
            if not self._take(frame):
                self.counters["bad"] += 1

    def refused(self, head: bytes, why: int) -> None:
        """Tell the guest, and the log, that a frame was dropped.

        :param head: its first bytes, with zeros behind them if there are fewer than the headers take
        :param why: index of the reason in ``virtio.net._policy.REASONS``
        """
        reason = REASONS[why]
        self.log(f"policy {reason}", f"the policy keeps the guest from {frames.describe(head)}: {_WHY[reason]}")
        if reason in ("address", "nameserver"):
            with self._lock:
                self._frames.append(frames.unreachable(head))

    def _take(self, frame: bytes) -> bool:
        if len(frame) < 42 or frame[12:15] != b"\x08\0\x45" or frame[30:34] != self.address:
            return False
        size = int.from_bytes(frame[16:18], "big")
        if not 28 <= size <= len(frame) - 14 or int.from_bytes(frame[20:22], "big") & 0x3FFF:
            return False
        if frame[23] == 6:
            self._frames.append(frames.unreachable(frame, *frames.NO_PORT))  # no answer of ours is too long for UDP
            return False
        if frame[23] != 17:
            return False
        port, target, length, _ = frames.UDP.unpack_from(frame, 34)
        if target != dns.PORT or not 8 <= length <= size - 20:
            return False
        try:
            question = dns.read_question(frame[42 : 34 + length])
        except ValueError:
            return False
        self.counters["asked"] += 1
        self._ask((frame[:42], port), question)
        return True

    def _ask(self, client: Client, question: dns.Question) -> None:
        if question.error:
            self.counters["bad"] += 1
            self._reply(client, question, question.error)
            return
        name, kind = key = question.name, question.kind
        ports = self.ports(name)
        if not ports:
            self.counters["refused"] += 1
            self.log("policy name", f"the policy keeps the guest from the name {name or '.'}")
            self._reply(client, question, dns.NO_SUCH_NAME)  # what every client takes for an answer, at once
        elif kind not in dns.SIZES:
            self._reply(client, question)
        elif name in self.hosts:
            size = dns.SIZES[kind]
            addresses = self._learn(key, [each for each in self.hosts[name] if len(each) == size], LEAST)
            self._reply(client, question, addresses=addresses, ttl=LEAST)
        elif (known := self._known.get(key)) and known[1] > time.monotonic():
            self._reply(client, question, addresses=known[0], ttl=int(known[1] - time.monotonic()))
        else:
            self._pass_on(client, question)

    def _pass_on(self, client: Client, question: dns.Question) -> None:
        key = question.name, question.kind
        asked = self._asked.get(key)
        if (asked is None and len(self._asked) >= MAX_PENDING) or (asked and len(asked.clients) >= MAX_CLIENTS):
            self.counters["limited"] += 1
            self._reply(client, question, dns.FAILED)
            return
        if asked is None:
            asked = self._asked[key] = _Asked(*key)
            os.eventfd_write(self._wake, 1)
        asked.clients.append((client, question))

    def _learn(self, key: tuple[str, int], addresses: list[bytes], ttl: int, *, known: bool = True) -> list[bytes]:
        # What of a name's addresses the guest may have, which it can reach from here on.
        found, entries = self._admit(key, addresses, ttl, known=known)
        if entries:
            self.policy.learn(entries)
        return found

    def _admit(
        self, key: tuple[str, int], addresses: list[bytes], ttl: int, *, known: bool
    ) -> tuple[list[bytes], list[tuple[bytes, int, int, int]]]:
        # What of a name's addresses the guest may have, and the policy is to learn. Those that are not known were a
        # nameserver's words.
        fitting = dns.fitting(key[1], len(key[0]) + 6)
        lifetime = max(ttl, LEAST)
        found, entries = [], []
        for address in addresses:
            whole = address if len(address) == 16 else frames.MAPPED + address
            if not _is_own(whole) and (known or not _is_here(address)):
                entries += [(whole, first, last, lifetime) for first, last in self.ports(key[0])]
            elif not self.policy.allows(whole):
                self.counters["own"] += 1
                self.log("policy own", f"the policy keeps the guest from {frames.text(whole)}, which {key[0]} has")
                continue
            found.append(address)
            if len(found) == fitting:
                break
        now = time.monotonic()
        if len(self._known) >= MAX_KNOWN:
            self._known = {key: each for key, each in self._known.items() if each[2] > now}
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
        self._known[key] = found, now + ttl, now + lifetime
        return found, entries

    def _reply(
        self, client: Client, question: dns.Question, error: int = dns.NO_ERROR, addresses: Sequence[bytes] = (),
        ttl: int = 0,
    ) -> None:  # fmt: skip
        self.counters["answered"] += not error
        self._identity = self._identity + 1 & 0xFFFF
        data = dns.answer(question, error, addresses, ttl)
        self._frames.append(frames.datagram(*client, data, self._identity))

    # What a copy of the guest goes on with

    def save(self) -> list[tuple[str, int, list[bytes], int]]:
        """Names, kinds, addresses and the seconds that they are allowed for."""
        now = time.monotonic()
        with self._lock:
            return [(*key, addresses, int(end - now)) for key, (addresses, _, end) in self._known.items() if end > now]

    def restore(self, state: Iterable[Any]) -> None:
        """Allow what of ``save`` this policy allows.

        :raises ValueError: the state is invalid
        """
        learned = []
        with self._lock:
            for name, kind, addresses, seconds in state:
                if kind not in dns.SIZES or not all(len(each) == dns.SIZES[kind] for each in addresses):
                    raise ValueError("no such addresses")
                if self.ports(name):
                    seconds = max(0, min(seconds, LONGEST))
                    learned += self._admit((name, kind), list(addresses), seconds, known=name in self.hosts)[1]
            self.policy.learn(learned)  # all at once: each time the whole table is made anew

    # The thread

    def _serve(self) -> None:
        while not self._closing:
            with self._lock:
                pending = tuple(self._asked.values())
            now = time.monotonic()
            for asked in pending:
                if asked.deadline <= now:
                    self._shut(asked)
                    self._send(asked)
            waiting = {asked.socket.fileno(): asked for asked in pending if asked.socket is not None}
            poll = select.poll()
            for fd in (self._wake, *waiting):
                poll.register(fd, select.POLLIN)
            wait = min((asked.deadline - time.monotonic() for asked in waiting.values()), default=None)
            for fd, _ in poll.poll(None if wait is None else max(0, int(wait * 1000) + 1)):
                if fd == self._wake:
                    os.eventfd_read(fd)
                elif self._hear(waiting[fd]):
                    self._shut(waiting[fd])
        for asked in tuple(self._asked.values()):
            self._shut(asked)

    def _send(self, asked: _Asked) -> None:
        while asked.tries < TRIES and self.servers:
            server = self.servers[asked.tries % len(self.servers)]
            asked.tries += 1
            asked.number = int.from_bytes(os.urandom(2), "big")
            try:
                # One each: its port is one more thing that nobody else knows.
                family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
                asked.socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                asked.socket.connect(server)
                query = dns.query(asked.number, asked.name, asked.kind, plain=asked.plain)
                asked.socket.send(query, socket.MSG_DONTWAIT)
            except OSError:
                self._shut(asked)
                continue
            self.counters["upstream"] += 1
            asked.deadline = time.monotonic() + PATIENCE
            return
        self._done(asked, dns.FAILED, [], 0)

    def _shut(self, asked: _Asked) -> None:
        if asked.socket is not None:
            asked.socket.close()
            asked.socket = None

    def _hear(self, asked: _Asked) -> bool:
        # Whether this was it. Another's answer, or an error that comes at once, is waited past: the next try may do.
        assert asked.socket is not None
        try:
            data = asked.socket.recv(dns.ROOM, socket.MSG_DONTWAIT)
            code, addresses, ttl = dns.read_answer(data, asked.number, asked.name, asked.kind)
        except BlockingIOError:
            return False
        except OSError:
            asked.deadline = 0.0
            return False
        except (ValueError, struct.error):
            self.counters["upstream_bad"] += 1
            return False
        if code not in (dns.NO_ERROR, dns.NO_SUCH_NAME) and asked.tries < TRIES:
            asked.plain = asked.plain or code in (dns.BAD_FORMAT, dns.NOT_IMPLEMENTED)
            asked.deadline = 0.0
            return False
        self._done(asked, code, addresses, min(ttl, LONGEST))
        return True

    def _done(self, asked: _Asked, code: int, addresses: list[bytes], ttl: int) -> None:
        with self._lock:
            key = asked.name, asked.kind
            if code in (dns.NO_ERROR, dns.NO_SUCH_NAME):
                addresses = self._learn(key, addresses, ttl, known=False) if addresses else []
            else:
                self.counters["failed"] += len(asked.clients)
                code, addresses = dns.FAILED, []
            for client, question in asked.clients:
                self._reply(client, question, code, addresses, ttl)
            self._asked.pop(key, None)
        self.on_frame()


def _is_here(address: bytes) -> bool:
    # Whether it is this host's, whatever its network: then it is where a connection to it would come from.
    address = address[12:] if address.startswith((_NAT64, frames.MAPPED)) else address
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    try:
        probe = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT  # a host without IPv6 has no such address; else nobody can tell
    try:
        probe.connect((socket.inet_ntop(family, address), dns.PORT))  # which sends nothing
        return bool(probe.getsockname()[0] == socket.inet_ntop(family, address))
    except OSError:
        return False
    finally:
        probe.close()


def _fits(name: str, pattern: str) -> bool:
    if pattern == "*":
        return bool(name)
    return name.endswith(pattern[1:]) and name != pattern[2:] if pattern.startswith("*.") else name == pattern


def _is_own(address: bytes) -> bool:
    return _OWN.allows(frames.MAPPED + address[12:] if address.startswith(_NAT64) else address)


_WHY = {
    "malformed": "a frame whose headers make no sense",
    "protocol": "only TCP, UDP and ping go out",
    "options": "a packet with IP options or extension headers",
    "fragment": "a fragment of a packet",
    "source": "from an address that is not the guest's",
    "special": "an address of no network",
    "nameserver": "a nameserver; the guest has one of its own",
    "address": "not allowed",
}
