# SPDX-License-Identifier: Apache-2.0
"""The network device (§5.1): pairs of queues over a tap or passt, and the control queue."""

from __future__ import annotations

import errno
import os
import struct

from virtio import spec
from virtio._limiter import RateLimiter
from virtio.device import VirtioDevice, threads_for
from virtio.net._worker import NetWorker
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from virtio._limiter import Bucket
    from virtio._worker import QueueWorker
    from virtio.device import ActivateContext
    from virtio.net._policy import Policy
    from virtio.net.mmds import Endpoint
    from virtio.net.resolver import Resolver
    from vmm._fastpath import Chain

    class Backend(Protocol):
        """Where frames come from and go to; see ``virtio.net.host``."""

        fds: list[int]
        stream: bool

        def gone(self) -> str: ...
        def set_offloads(self, features: int) -> None: ...
        def set_pairs(self, count: int) -> None: ...


QUEUE_SIZE = 512
CTRL_QUEUE_SIZE = 64
CTRL_REQUEST_MAX = 1 << 16  # a table of 10,000 addresses; Linux sends what its multicast list has
DEFAULT_MTU = 1500
_HEX = frozenset("0123456789abcdefABCDEF")
# Those that the driver can switch while it runs (§5.1.6.5.6.1), and the tap by them.
GUEST_OFFLOADS = (
    spec.NET_F_GUEST_CSUM | spec.NET_F_GUEST_TSO4 | spec.NET_F_GUEST_TSO6 | spec.NET_F_GUEST_ECN | spec.NET_F_GUEST_UFO
)
_TO_GUEST_FEATURES = GUEST_OFFLOADS | spec.NET_F_CTRL_GUEST_OFFLOADS
_TO_HOST_FEATURES = (
    spec.NET_F_CSUM | spec.NET_F_HOST_TSO4 | spec.NET_F_HOST_TSO6 | spec.NET_F_HOST_ECN | spec.NET_F_HOST_UFO
)
_CTRL_FEATURES = spec.NET_F_CTRL_VQ | spec.NET_F_CTRL_RX | spec.NET_F_CTRL_VLAN | spec.NET_F_CTRL_MAC_ADDR
# Source: pcap-savefile(5): nanoseconds, version 2.4, whole frames, LINKTYPE_ETHERNET.
_PCAP_HEADER = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 0x40000, 1)


def parse_mac(text: str) -> bytes:
    """The six bytes of a hardware address as people write it.

    :raises ConfigError: the text is not a unicast MAC address
    """
    parts = text.split(":")
    mac = bytes.fromhex("".join(parts)) if all(len(part) == 2 and _HEX.issuperset(part) for part in parts) else b""
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise ConfigError("mac", text, "must be a unicast MAC address, e.g. 06:00:ac:10:00:02")
    return mac


def default_mac(name: str) -> bytes:
    """A hardware address of our own making, the same each time for the same interface of the host."""
    import zlib

    return b"\x02\x56" + zlib.crc32(name.encode()).to_bytes(4, "big")


class Net(VirtioDevice):
    """A virtio network device over `backend`.

    :param backend: a :class:`virtio.net.host.Tap` or :class:`virtio.net.host.Passt`; not owned
    :param mac: six bytes
    :param mtu: told to the guest; None: not told
    :param pcap: path of a file that gets each frame, both ways; it is made anew
    :param rx_limiter: limits what the guest receives; None: no limit
    :param tx_limiter: limits what the guest sends; None: no limit
    :param mmds: the metadata service's endpoint: what the guest sends to its address does not reach `backend`
    :param policy: which frames of the guest's reach `backend`, which has one pair then; None: all
    :param resolver: the policy's; owned. None: nobody answers names
    :param name: name of the threads
    :param threads: number of worker threads; 0: one for each pair, but no more than half of this process's CPUs
    :raises ConfigError: the pcap file cannot be made
    """

    device_type = spec.TYPE_NET
    thread_kind = "net"

    def __init__(
        self,
        backend: Backend,
        mac: bytes,
        *,
        mtu: int | None = None,
        pcap: str | None = None,
        rx_limiter: RateLimiter | None = None,
        tx_limiter: RateLimiter | None = None,
        mmds: Endpoint | None = None,
        policy: Policy | None = None,
        resolver: Resolver | None = None,
        name: str = "virtio-net",
        threads: int = 0,
    ) -> None:
        if policy is not None and len(backend.fds) > 1:
            raise ValueError("one thread checks frames by a policy: the backend must have one pair of queues")
        super().__init__()
        self.name = name
        self.backend = backend
        self.mac = mac
        self.mtu = mtu
        self.rx_limiter = rx_limiter or RateLimiter()
        self.tx_limiter = tx_limiter or RateLimiter()
        self.mmds = mmds
        self.policy = policy
        self.resolver = resolver
        self.link_up = True
        self.pairs = len(backend.fds)
        self._threads = threads_for(self.pairs, threads)
        self.queue_sizes = (QUEUE_SIZE,) * (2 * self.pairs) + (CTRL_QUEUE_SIZE,)
        self.features = spec.NET_F_MAC | spec.NET_F_STATUS | spec.NET_F_MRG_RXBUF | _CTRL_FEATURES
        if not backend.stream:
            self.features |= _TO_GUEST_FEATURES
            if policy is None:  # or what was checked would be changed on its way
                self.features |= _TO_HOST_FEATURES
        if self.pairs > 1:
            self.features |= spec.NET_F_MQ
        if mtu is not None:
            self.features |= spec.NET_F_MTU
        self.counters |= {"control": 0, "bad_control": 0, "mmds_errors": 0, "resolver_errors": 0}
        self._offloads = self._pairs_used = 0
        self.config = self._config_space()
        self.pcap_fd = -1 if pcap is None else _open_pcap(pcap)

    def _config_space(self) -> bytes:
        return spec.NET_CONFIG.pack(self.mac, spec.NET_S_LINK_UP * self.link_up, self.pairs, self.mtu or DEFAULT_MTU)

    @property
    def stats(self) -> dict[str, int]:
        total = super().stats
        for name, part in (("mmds", self.mmds), ("policy", self.policy), ("dns", self.resolver)):
            if part is not None:
                total |= {f"{name}_{key}": value for key, value in part.counters.items()}
        total["rx_rate_limiter_throttled"] = self.rx_limiter.throttled
        total["tx_rate_limiter_throttled"] = self.tx_limiter.throttled
        return total

    def make_workers(self, notify_fds: Sequence[int], on_failure: Callable[[Exception], None]) -> Sequence[QueueWorker]:
        """The pairs are dealt out to the threads in turn; the first one has the control queue, too."""
        self._workers = []
        for thread in range(self._threads):
            indices = [2 * pair + way for pair in range(self.pairs)[thread :: self._threads] for way in (0, 1)]
            if thread == 0:
                indices.append(2 * self.pairs)
            fds = [notify_fds[index] for index in indices]
            name = f"{self.name}.{thread}" if thread else self.name
            self._workers.append(NetWorker(self, indices, fds, on_failure, name))
        if self.resolver is not None:
            self.resolver.on_frame = self._workers[0].wake
        return self._workers

    def activate(self, context: ActivateContext) -> None:
        if self.mmds is not None:
            self.mmds.reset()
        if self.resolver is not None:
            self.resolver.log = context.warn
            self.resolver.reset()
        self._use(1, context.features)

    def _use(self, pairs: int, offloads: int) -> None:
        self.backend.set_pairs(pairs)
        self.backend.set_offloads(offloads)
        self._pairs_used, self._offloads = pairs, offloads

    def save(self) -> dict[str, Any]:
        state = {"mac": self.mac, "pairs": self._pairs_used, "offloads": self._offloads & GUEST_OFFLOADS}
        return state if self.resolver is None else state | {"names": self.resolver.save()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take them; the address is the guest's, whatever this device was to have."""
        if len(state["mac"]) != 6 or not 1 <= state["pairs"] <= self.pairs:
            raise ValueError("no such address or number of pairs")
        self.mac = bytes(state["mac"])
        self.config = self._config_space()
        self._use(state["pairs"], state["offloads"] & self.context.features)
        if self.resolver is not None:
            self.resolver.restore(state.get("names", ()))

    def set_rate_limit(self, limiter: RateLimiter, bandwidth: Bucket | None = None, ops: Bucket | None = None) -> None:
        """Change ``rx_limiter`` or ``tx_limiter`` at once, also for a frame that waits for it; any thread."""
        self._limit(limiter, bandwidth, ops)

    def drop_link(self) -> None:
        """The other end is gone: pull the cable and say so; called by a worker, once."""
        self.context.warn("lost", f"{self.name}: {self.backend.gone()}; the link is down")
        self.link_up = False
        self.publish_config(self._config_space())

    def process(self, queue_index: int) -> None:
        self.drain(self.context.queues[queue_index], self._control)

    def _control(self, chain: Chain) -> int:
        self.counters["control"] += 1
        if not chain.writable_bytes:
            self.counters["bad_control"] += 1
            return 0
        request = chain.gather(CTRL_REQUEST_MAX)
        try:
            done = 2 <= chain.readable_bytes <= CTRL_REQUEST_MAX and self._command(request[0], request[1], request[2:])
        except OSError as error:
            self.context.warn("control", f"{self.name}: {os.strerror(error.errno or 0)}")
            done = False
        if not done:
            self.counters["bad_control"] += 1
        return chain.scatter(bytes([spec.NET_OK if done else spec.NET_ERR]))

    def _command(self, kind: int, command: int, data: bytes) -> bool:
        # Whether it is done. We filter nothing: what the tap gives is the guest's, so modes and tables need no more.
        match kind, command:
            case spec.NET_CTRL_RX, command:
                return command <= 5 and len(data) == 1
            case spec.NET_CTRL_MAC, spec.NET_CTRL_MAC_TABLE_SET:
                return _is_two_tables(data)
            case spec.NET_CTRL_MAC, spec.NET_CTRL_MAC_ADDR_SET:
                if len(data) != 6 or data[0] & 1:
                    return False
                self.mac = data
                self.publish_config(self._config_space(), tell=False)
                return True
            case spec.NET_CTRL_VLAN, command:
                return command <= 1 and len(data) == 2
            case spec.NET_CTRL_MQ, spec.NET_CTRL_MQ_VQ_PAIRS_SET:
                count = int.from_bytes(data, "little")
                if len(data) != 2 or not 1 <= count <= self.pairs or not self.context.features & spec.NET_F_MQ:
                    return False
                self._use(count, self._offloads)
                return True
            case spec.NET_CTRL_GUEST_OFFLOADS, spec.NET_CTRL_GUEST_OFFLOADS_SET:
                wanted = int.from_bytes(data, "little")
                allowed = self.context.features & GUEST_OFFLOADS
                if len(data) != 8 or wanted & ~allowed or not self.context.features & spec.NET_F_CTRL_GUEST_OFFLOADS:
                    return False
                self._use(self._pairs_used, wanted)
                return True
        return False

    def close(self) -> None:
        """Close the pcap file and the resolver; idempotent. The transport is closed before."""
        if self.resolver is not None:
            self.resolver.close()
        if self.pcap_fd >= 0:
            os.close(self.pcap_fd)
            self.pcap_fd = -1


def _is_two_tables(data: bytes) -> bool:
    # A table of unicast addresses and one of multicast: each a count of 4 bytes and so many times 6.
    for _ in range(2):
        count = int.from_bytes(data[:4], "little")
        if len(data) < 4 + 6 * count:
            return False
        data = data[4 + 6 * count :]
    return not data


def _open_pcap(path: str) -> int:
    fd = -1
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(fd, _PCAP_HEADER)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise ConfigError("pcap", path, f"cannot be made: {os.strerror(error.errno or errno.EIO)}") from None
    return fd
