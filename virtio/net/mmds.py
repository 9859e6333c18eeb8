# SPDX-License-Identifier: Apache-2.0
"""A small TCP/IPv4 endpoint inside the network device, by which the guest reaches the metadata service.

It answers ARP for one address and accepts connections to port 80. It does not interpret their data. Its peer is on the
other side of a ring, so nothing is lost or reordered on the way. It drops segments that are out of order, and repeats
data that was not acknowledged in time.

Sources: RFC 9293 (TCP), RFC 5961 (blind resets), RFC 826 (ARP), RFC 1071 (checksums).
"""

from __future__ import annotations

import os
import struct
import threading
import time
from _collections import deque  # type: ignore[import-not-found]  # `collections` takes long to import

from virtio.net import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # Bytes received so far, to: how many of them were a request (0: it is not all there), its answer, and whether the
    # connection ends with it.
    Serve = Callable[[bytes], tuple[int, bytes, bool]]
    Key = tuple[bytes, int]

MAC = bytes.fromhex("060123456701")
PORT = 80
MAX_CONNECTIONS = 30
MAX_FRAMES = 100  # resets and the like, waiting to be sent
RECEIVE = 4096  # bytes of a connection's requests, held until they are answered
MSS = 1460
MIN_MSS = 64
IDLE = 10.0  # seconds until a silent connection may be given up for a new one
FIRST_TIMEOUT, LONGEST_TIMEOUT = 0.3, 3.0  # seconds until something is sent again
MAX_TIMEOUTS = 10
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
_ARP_REPLY = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2)
_ARP_REQUEST = b"\x08\x06" + struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
_TCP = struct.Struct(">HHIIBBHHH")
_MASK = 0xFFFF_FFFF


def _is_wrong(data: bytes) -> bool:
    # By the checksum that is in it.
    return frames.checksum(data) != 0xFFFF


def _after(one: int, other: int) -> int:
    # How far a sequence number is after another, which may be behind it.
    return ((one - other + 0x8000_0000) & _MASK) - 0x8000_0000


class _Connection:
    # Sequence numbers: `una` is the first that is not acknowledged, `nxt` the next to be sent, `top` the first that was
    # never sent. `out` are the bytes from `una` on; after them comes a FIN once `closing`. `expected`: the peer's next.

    def __init__(self, mac: bytes, mss: int, sequence: int, window: int, now: float) -> None:
        self.mac = mac
        self.mss = mss
        self.expected = (sequence + 1) & _MASK
        self.una = self.nxt = self.top = int.from_bytes(os.urandom(4), "big")
        self.edge = (self.una + 1 + window) & _MASK
        self.established = False
        self.received = bytearray()
        self.out = bytearray()
        self.closing = False
        self.fin_acknowledged = False
        self.peer_closed = False
        self.must_acknowledge = False
        self.probing = False
        self.seen = now
        self.deadline: float | None = None
        self.timeouts = 0

    def acknowledge(self, number: int, window: int) -> bool:
        """Take the peer's acknowledgement and window; false: of what was never sent."""
        count = _after(number, self.una)
        if count > _after(self.top, self.una):
            return False
        if count >= 0:
            if self.nxt == self.una and _after(number + window, self.edge) > 0:
                self.deadline = None  # of a closed window, which is open now
            self.edge = (number + window) & _MASK
        if count > 0:
            self.fin_acknowledged = self.closing and count > len(self.out)
            del self.out[:count]
            self.una = number
            if _after(number, self.nxt) > 0:
                self.nxt = number
            self.deadline = None
            self.timeouts = 0
        return True

    def take(self, sequence: int, data: bytes, fin: bool) -> None:
        """Take what is new of a segment's data, as far as there is room."""
        early = _after(self.expected, sequence)
        if early < 0 or early > len(data):
            self.must_acknowledge = True  # it will come again, or came before
            return
        data = data[early:]
        if not data and not fin:
            self.must_acknowledge = self.must_acknowledge or early > 0
            return
        self.must_acknowledge = True
        room = RECEIVE - len(self.received)
        self.expected = (self.expected + min(len(data), room)) & _MASK
        if not self.peer_closed and not self.closing:
            self.received += data[:room]
        if fin and len(data) <= room and not self.peer_closed:
            self.expected = (self.expected + 1) & _MASK
            self.peer_closed = True

    def expire(self, now: float) -> bool:
        """Make ready to send again what was not answered in time; false: give up."""
        if self.deadline is None or now < self.deadline:
            return True
        self.deadline = None
        self.timeouts += 1
        if self.timeouts > MAX_TIMEOUTS or self.fin_acknowledged:
            return False
        self.probing = _after(self.edge, self.una) <= 0
        self.nxt = self.una
        return True

    def segment(self, now: float) -> tuple[int, int, bytes] | None:
        """The flags, sequence number and data of the next segment to be sent; None: none is due."""
        flags, number, data = ACK, self.nxt, b""
        if not self.established:
            if self.nxt != self.una:
                return None
            flags |= SYN
            self.nxt = (self.una + 1) & _MASK
        else:
            sent = _after(self.nxt, self.una)
            room = max(_after(self.edge, self.nxt), int(self.probing))
            if sent < len(self.out) and room > 0:
                data = bytes(self.out[sent : sent + min(self.mss, room)])
                flags |= PSH * (sent + len(data) == len(self.out))
                self.probing = False
            last = sent + len(data) == len(self.out) and self.closing and not self.fin_acknowledged
            if last:
                flags |= FIN
            elif not data and not self.must_acknowledge:
                self._arm(now)
                return None
            self.nxt = (self.nxt + len(data) + last) & _MASK
        if _after(self.nxt, self.top) > 0:
            self.top = self.nxt
        self.must_acknowledge = False
        self._arm(now)
        return flags, number, data

    def _arm(self, now: float) -> None:
        if self.deadline is not None:
            return
        if self.fin_acknowledged:
            self.deadline = now + IDLE  # that the peer closes, too
        elif self.nxt != self.una or self.out:
            self.deadline = now + min(FIRST_TIMEOUT * 2**self.timeouts, LONGEST_TIMEOUT)


class Endpoint:
    """The metadata service's end of the guest's network, at `address`; shared by an interface's queue pairs.

    :param serve: what answers the guest; called with the endpoint's lock held
    :param address: IPv4, four bytes
    :param clock: seconds, for the tests

    ``receive`` takes a frame, ``next_frame`` gives those to be received by the guest, until None; both from any thread.
    """

    what = "metadata service"

    def __init__(self, serve: Serve, address: bytes, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self.counters = dict.fromkeys(
            ("rx_accepted", "rx_accepted_err", "rx_accepted_unusual", "rx_bad_eth", "rx_count", "tx_bytes", "tx_count",
             "tx_errors", "tx_frames", "connections_created", "connections_destroyed"), 0
        )  # fmt: skip
        self._serve = serve
        self._clock = clock
        self._lock = threading.Lock()
        self._connections: dict[Key, _Connection] = {}
        self._frames: deque[bytes] = deque(maxlen=MAX_FRAMES)
        self._identity = 0

    def reset(self) -> None:
        """Forget every connection: the driver begins anew."""
        with self._lock:
            self.counters["connections_destroyed"] += len(self._connections)
            self._connections.clear()
            self._frames.clear()

    def timeout(self) -> float | None:
        """Seconds until ``next_frame`` may have one by the clock alone; None: it will not."""
        with self._lock:
            deadlines = [each.deadline for each in self._connections.values() if each.deadline is not None]
            return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def next_frame(self) -> bytes | None:
        """A frame for the guest to receive; None if no frame waits."""
        with self._lock:
            frame = self._next_frame()
            if frame is not None:
                self.counters["tx_frames"] += 1
                self.counters["tx_bytes"] += len(frame)
            return frame

    def _next_frame(self) -> bytes | None:
        now = self._clock()
        for key, connection in list(self._connections.items()):
            if not connection.expire(now):
                self._reset(connection.mac, key, connection.nxt, connection.expected)
                self._drop(key)
            elif segment := connection.segment(now):
                # The others come first the next time.
                self._connections[key] = self._connections.pop(key)
                flags, number, data = segment
                window = RECEIVE - len(connection.received)
                return self._packet(connection.mac, key, number, connection.expected, flags, window, data)
        return self._frames.popleft() if self._frames else None

    def receive(self, frame: bytes, *, partial: bool = False) -> None:
        """Take a frame of the guest's that may be for us; what is not, is dropped.

        :param frame: whole, from its Ethernet header; the guest cannot change it any more
        :param partial: the TCP checksum is left to the one who puts the frame on a wire, which nobody does
        """
        with self._lock:
            self.counters["rx_accepted"] += 1
            if frame[12:22] == _ARP_REQUEST and len(frame) >= 42 and frame[38:42] == self.address:
                answer = frame[22:28] + MAC + b"\x08\x06" + _ARP_REPLY + MAC + self.address + frame[22:32]
                if answer not in self._frames:
                    self._frames.append(answer)
            elif frame[12:14] != b"\x08\0" or len(frame) < 34:
                self.counters["rx_bad_eth"] += 1
            else:
                self._ip(frame, partial)

    def _ip(self, frame: bytes, partial: bool) -> None:
        first, _, size, _, fragment, _, protocol, _, source, target = frames.IPV4.unpack_from(frame, 14)
        head = (first & 15) * 4
        if first >> 4 != 4 or not 20 <= head <= size <= len(frame) - 14 or _is_wrong(frame[14 : 14 + head]):
            self.counters["rx_accepted_err"] += 1
            return
        if target != self.address or fragment & 0x3FFF or protocol != 6:
            self.counters["rx_accepted_unusual"] += 1
            return
        segment = frame[14 + head : 14 + size]
        offset = segment[12] >> 4 if len(segment) >= 20 else 0
        pseudo = source + target + struct.pack(">HH", 6, len(segment))
        if not 20 <= offset * 4 <= len(segment) or (not partial and _is_wrong(pseudo + segment)):
            self.counters["rx_accepted_err"] += 1
            return
        self.counters["rx_count"] += 1
        self._tcp(frame[6:12], source, segment, segment[offset * 4 :])

    def _tcp(self, mac: bytes, source: bytes, segment: bytes, data: bytes) -> None:
        port, target, number, acknowledged, _, flags, window, _, _ = _TCP.unpack_from(segment)
        flags &= FIN | SYN | RST | ACK
        key = source, port
        connection = self._connections.get(key)
        now = self._clock()
        if target != PORT or connection is None:
            if target == PORT and flags == SYN and self._has_room(now):
                mss = max(MIN_MSS, min(MSS, _mss(segment[20 : len(segment) - len(data)])))
                self._connections[key] = _Connection(mac, mss, number, window, now)
                self.counters["connections_created"] += 1
            elif not flags & RST:
                end = number + len(data) + bool(flags & SYN) + bool(flags & FIN)
                self._reset(mac, key, acknowledged if flags & ACK else 0, None if flags & ACK else end, target)
            return
        connection.mac = mac
        connection.seen = now
        if flags & RST:
            if number == connection.expected:
                self._drop(key)
            else:
                connection.must_acknowledge = connection.established
        elif flags & SYN:
            if connection.established:
                connection.must_acknowledge = True  # a peer that began anew answers with the right reset
            elif flags == SYN and _after(connection.expected, number) == 1:
                connection.nxt = connection.una
        elif flags & ACK:
            self._established(mac, key, connection, number, acknowledged, flags, window, data)
        else:
            self.counters["rx_accepted_unusual"] += 1

    def _established(
        self, mac: bytes, key: Key, connection: _Connection, number: int, acknowledged: int, flags: int, window: int,
        data: bytes,
    ) -> None:  # fmt: skip
        if not connection.established:
            if acknowledged != connection.top or connection.top == connection.una:
                self._reset(mac, key, acknowledged, None)
                return
            connection.established = True
        if not connection.acknowledge(acknowledged, window):
            connection.must_acknowledge = True
            self.counters["rx_accepted_unusual"] += 1
            return
        connection.take(number, data, bool(flags & FIN))
        # One answer at a time: what is held for a connection is bounded.
        while connection.received and not connection.out and not connection.closing:
            used, connection.out[:], connection.closing = self._serve(bytes(connection.received))
            if not used:
                break
            connection.must_acknowledge = True
            del connection.received[:used]
        if connection.closing or (connection.peer_closed and not connection.out):
            connection.closing = True
            connection.received.clear()
        if connection.peer_closed and connection.fin_acknowledged:
            if connection.must_acknowledge:
                self._frames.append(self._packet(mac, key, connection.nxt, connection.expected, ACK, RECEIVE))
            self._drop(key)

    def _has_room(self, now: float) -> bool:
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        key = min(self._connections, key=lambda each: self._connections[each].seen)
        oldest = self._connections[key]
        if now - oldest.seen < IDLE:
            return False
        self._reset(oldest.mac, key, oldest.nxt, oldest.expected)
        self._drop(key)
        return True

    def _drop(self, key: Key) -> None:
        del self._connections[key]
        self.counters["connections_destroyed"] += 1

    def _reset(self, mac: bytes, key: Key, number: int, acknowledged: int | None, port: int = PORT) -> None:
        flags = RST if acknowledged is None else RST | ACK
        self._frames.append(self._packet(mac, key, number, acknowledged or 0, flags, 0, port=port))

    def _packet(
        self, mac: bytes, key: Key, number: int, acknowledged: int, flags: int, window: int, data: bytes = b"",
        port: int = PORT,
    ) -> bytes:  # fmt: skip
        peer, peer_port = key
        options = struct.pack(">BBH", 2, 4, MSS) if flags & SYN else b""
        offset = (20 + len(options)) << 2
        head = _TCP.pack(port, peer_port, number & _MASK, acknowledged & _MASK, offset, flags, window, 0, 0)
        segment = head + options + data
        segment = frames.with_checksum(segment, 16, self.address + peer + struct.pack(">HH", 6, len(segment)))
        self._identity = self._identity + 1 & 0xFFFF
        self.counters["tx_count"] += 1
        return mac + MAC + b"\x08\0" + frames.ipv4(6, self.address, peer, segment, self._identity)


def _mss(options: bytes) -> int:
    # The MSS among a SYN's options; RFC 9293's default if it is missing or makes no sense.
    at = 0
    while at + 1 < len(options) and options[at] != 0:
        size = 1 if options[at] == 1 else options[at + 1]
        if options[at] == 2 and size == 4 and at + 4 <= len(options):
            return int.from_bytes(options[at + 2 : at + 4], "big")
        if size == 0:
            break
        at += size
    return 536
