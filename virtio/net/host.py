# SPDX-License-Identifier: Apache-2.0
"""The host's side of a network device: a tap, ours or another's, or passt. NAT for a tap is in ``virtio/net/nat.py``.

Source: Linux linux/if_tun.h, linux/if.h, linux/sockios.h; Documentation/networking/tuntap.rst; passt(1).
"""

from __future__ import annotations

import _socket as socket  # which imports more
import errno
import fcntl
import os
import struct

from virtio import spec
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TUN = "/dev/net/tun"
TUNSETIFF = 0x4004_54CA
TUNSETOFFLOAD = 0x4004_54D0
TUNGETIFF = 0x8004_54D2
TUNSETVNETHDRSZ = 0x4004_54D8
TUNSETQUEUE = 0x4004_54D9
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_TUN_EXCL = 0x8000
VNET_HEADER = 12
_TUN_F = {
    spec.NET_F_GUEST_CSUM: 0x01,
    spec.NET_F_GUEST_TSO4: 0x02,
    spec.NET_F_GUEST_TSO6: 0x04,
    spec.NET_F_GUEST_ECN: 0x08,
    spec.NET_F_GUEST_UFO: 0x10,
}
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
SIOCSIFNETMASK = 0x891C
SIOCSIFMTU = 0x8922
IFF_UP = 1
IFNAMSIZ = 16
_IFREQ = struct.Struct("16sH22x")  # ifr_name, ifr_flags
_IFREQ_INT = struct.Struct("16si20x")
_IFREQ_ADDR = struct.Struct("=16sHH4s16x")  # ifr_name and a struct sockaddr_in
_NOT_PERMITTED = "is not yours to open, which takes CAP_NET_ADMIN; or use user, which takes nothing"
_PROBLEMS: dict[int | None, str] = {
    errno.ENOENT: f"{TUN} is not here: modprobe tun",
    errno.EPERM: _NOT_PERMITTED,
    errno.EACCES: _NOT_PERMITTED,
    errno.EBUSY: "is in use",
    errno.EINVAL: "is not a tap, or has another number of queues",
}


class Tap:
    """A tap device, one descriptor a pair of queues; owns the descriptors.

    :param name: name of the interface; ``%d`` in the name of one to be made is replaced by a number that is free
    :param queues: pairs, 1 to 8
    :param make: it is made, and is gone with the descriptors; otherwise it has to be there
    :raises ConfigError: the tap cannot be opened

    ``name`` is its real name. Which of the queues the host uses is ``set_pairs``.
    """

    stream = False

    def __init__(self, name: str, queues: int = 1, *, make: bool = False) -> None:
        self.name = name
        self.fds: list[int] = []
        self._attached = queues
        if not 0 < len(name.encode()) < IFNAMSIZ or "/" in name or name.isspace():
            raise ConfigError("tap", name, f"must be the name of an interface, of 1 to {IFNAMSIZ - 1} bytes")
        try:
            if not make:
                socket.if_nametoindex(name)  # or the kernel would make what a slip of the finger named
        except OSError:
            raise ConfigError("tap", name, "does not exist: make it with ip tuntap add, or use auto") from None
        try:
            for index in range(queues):
                self._open(IFF_MULTI_QUEUE * (queues > 1) | IFF_TUN_EXCL * (make and index == 0))
        except OSError as error:
            self.close()
            problem = _PROBLEMS.get(error.errno, f"cannot be opened: {error.strerror}")
            raise ConfigError("tap", name, problem) from None

    @classmethod
    def inherited(cls, fd: int) -> Tap:
        """The tap of an open descriptor, which is owned from here on.

        :raises ConfigError: the descriptor is not a tap with IFF_VNET_HDR
        """
        try:
            name, flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
            if not flags & IFF_TAP or not flags & IFF_VNET_HDR:
                raise ConfigError("tap fd", fd, "must be a tap that was opened with IFF_TAP and IFF_VNET_HDR")
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
        except OSError as error:
            raise ConfigError("tap fd", fd, f"is not a tap: {error.strerror}") from None
        tap = cls.__new__(cls)
        tap.name, tap.fds, tap._attached = name.rstrip(b"\0").decode(), [fd], 1
        return tap

    def gone(self) -> str:
        return f"its tap {self.name} is gone"

    def _open(self, options: int) -> None:
        fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.fds.append(fd)
        try:
            self._attach(fd, options)
        except OSError as error:
            if error.errno != errno.EINVAL or options:
                raise
            self._attach(fd, IFF_MULTI_QUEUE)  # made by somebody for several
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))

    def _attach(self, fd: int, options: int) -> None:
        request = _IFREQ.pack(self.name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | options)
        self.name = _IFREQ.unpack(fcntl.ioctl(fd, TUNSETIFF, request))[0].rstrip(b"\0").decode()

    def set_offloads(self, features: int) -> None:
        """Let the host leave to the guest what of VIRTIO_NET_F_GUEST_* is in `features`.

        :raises OSError: the host refuses
        """
        offloads = sum(flag for feature, flag in _TUN_F.items() if features & feature)
        if not offloads & 0x06:
            offloads &= ~0x08  # ECN goes with TSO, and all go with checksums
        if not offloads & 0x01:
            offloads = 0
        for fd in self.fds[: self._attached]:
            fcntl.ioctl(fd, TUNSETOFFLOAD, offloads)

    def set_pairs(self, count: int) -> None:
        """Let the host use the first `count` queues.

        :raises OSError: the host refuses
        """
        for index in range(len(self.fds)):
            if (index < count) != (index < self._attached):
                flags = IFF_ATTACH_QUEUE if index < count else IFF_DETACH_QUEUE
                fcntl.ioctl(self.fds[index], TUNSETQUEUE, _IFREQ.pack(b"", flags))
        self._attached = count

    def configure(self, *, address: str | None = None, mtu: int | None = None) -> None:
        """Bring the interface up, with an IPv4 address such as ``10.0.0.1/24``.

        :raises ConfigError: an invalid address, or not permitted
        """
        name = self.name.encode()
        control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            if address is not None:
                bytes_, bits = parse_address(address)
                mask = (0xFFFF_FFFF << (32 - bits) & 0xFFFF_FFFF).to_bytes(4, "big")
                for request, value in ((SIOCSIFADDR, bytes_), (SIOCSIFNETMASK, mask)):
                    fcntl.ioctl(control, request, _IFREQ_ADDR.pack(name, socket.AF_INET, 0, value))
            if mtu is not None:
                fcntl.ioctl(control, SIOCSIFMTU, _IFREQ_INT.pack(name, mtu))
            flags = _IFREQ.unpack(fcntl.ioctl(control, SIOCGIFFLAGS, _IFREQ.pack(name, 0)))[1]
            fcntl.ioctl(control, SIOCSIFFLAGS, _IFREQ.pack(name, flags | IFF_UP))
        except OSError as error:
            raise ConfigError("tap", self.name, f"cannot be configured: {error.strerror}") from None
        finally:
            control.close()

    def close(self) -> None:
        """Give the descriptors back, and with them a tap of our own; idempotent."""
        while self.fds:
            os.close(self.fds.pop())


def parse_address(text: str) -> tuple[bytes, int]:
    """An IPv4 address and the bits of its network, from ``10.0.0.1/24``.

    :raises ConfigError: `text` is not such an address
    """
    address, _, bits = text.partition("/")
    try:
        packed = socket.inet_pton(socket.AF_INET, address)
    except OSError:
        packed = b""
    if not packed or not bits.isascii() or not bits.isdigit() or not 1 <= int(bits) <= 30:
        raise ConfigError("addr", text, "must be an IPv4 address with a prefix length, e.g. 10.0.0.1/24")
    return packed, int(bits)


_SOCKET_BYTES = 4 << 20  # as the host's limit allows


class Passt:
    """The user's own network, by a passt process of ours: no privileges; owns the process and the socket to it.

    :param loopback: the gateway's address is the host's loopback for the guest
    :param options: further ones for passt, as ``("-t", "8080")``
    :raises ConfigError: passt is not here

    What passt does not like it says at once and ends: then the link is down from the start.
    """

    stream = True
    name = "passt"

    def __init__(self, options: Sequence[str] = (), *, loopback: bool = False) -> None:
        import subprocess

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        theirs.setblocking(True)  # as passt expects it, whatever socket.setdefaulttimeout says
        # passt drops frames for which there is no room, and lets TCP send them again. It makes that room itself only
        # where it has made the socket.
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._said, said = os.pipe()
        os.set_blocking(self._said, False)
        os.set_blocking(said, False)  # what nobody reads must not hold passt up
        command = ["passt", "--foreground", "--quiet", "--fd", str(theirs.fileno()), *options]
        if not loopback:
            command.append("--no-map-gw")  # or it forwards connections to the gateway's address to 127.0.0.1
        try:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
        except OSError as error:
            ours.close()
            os.close(self._said)
            why = "apt-get install passt" if error.errno == errno.ENOENT else os.strerror(error.errno or 0)
            raise ConfigError("--net", "user", f"needs the program passt: {why}") from None
        finally:
            theirs.close()
            os.close(said)
        self.fds = [ours.detach()]

    def gone(self) -> str:
        """Say that passt has ended, and why, as far as it told."""
        import subprocess

        try:
            status = self._process.wait(1)
            words = os.read(self._said, 65536).decode(errors="replace").strip().splitlines()[-1:]
        except (subprocess.TimeoutExpired, OSError):
            return "passt has left"
        return ": ".join([f"passt has ended with {status}", *(words if status > 0 else ())])

    def set_offloads(self, features: int) -> None:
        """None are offered."""

    def set_pairs(self, count: int) -> None:
        """There is one."""

    def close(self) -> None:
        """End passt; idempotent."""
        while self.fds:
            os.close(self.fds.pop())  # which ends it
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        if self._said >= 0:
            os.close(self._said)
            self._said = -1
