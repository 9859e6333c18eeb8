# SPDX-License-Identifier: Apache-2.0
"""NAT for the network behind a tap: one nftables table, and forwarding by interface.

Linux forwards a packet if the interface on which it arrives has forwarding on. So it is on for the tap, and for the
interfaces on which answers arrive. This alone would make the host a router for the networks behind these, so the table
drops connections that begin there.

Source: Linux Documentation/networking/ip-sysctl.rst (conf/interface/forwarding); nft(8).
"""

from __future__ import annotations

import fcntl
import io
import re

from virtio.net.host import parse_address
from vmm.errors import ConfigError

PREFIX = "pyvmm_"
_CONF = "/proc/sys/net/ipv4/conf"
_UPLINKS = re.compile(r"table inet (\S+) \{\s*set uplinks \{[^{}]*(?:elements = \{([^}]*)\})?[^{}]*\}")
_RULES = """
table inet {table} {{
    set uplinks {{ type ifname; {elements} }}
    chain source {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{tap}" ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp dport 67 accept
        iifname "{tap}" ip saddr != {network} drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{tap}" meta nfproto ipv6 drop
        oifname "{tap}" meta nfproto ipv6 drop
        iifname "{tap}" ct state invalid drop
        ct status dnat accept
        oifname "{tap}" ct state != {{ established, related }} drop
        iifname @uplinks ct state != {{ established, related }} drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {network} oifname != "{tap}" masquerade
    }}
}}
"""


class Nat:
    """Lets a network out by the host's addresses; ended by ``close``.

    :param address: the host's on the tap, as ``10.0.0.1/24``
    :param tap: the interface that the network is behind, which goes with its VM
    :raises ConfigError: ``nft`` is not here, or it refuses; no such address

    The guest's packets have a source in its network, others are dropped. Nobody but the host begins a connection to it,
    unless a rule of the host's own (dnat) sends it there; the host forwards for nobody for whom it did not before. An
    interface that comes later lets no answers through.
    """

    def __init__(self, address: str, tap: str) -> None:
        if not _is_plain(tap):
            raise ConfigError("nat", tap, "needs a tap whose name has only letters, digits, - _ and .")
        parse_address(address)  # the rules have its text; nft makes a network of it
        self.table = PREFIX + tap
        self._uplinks: list[str] = []
        try:
            with _alone():
                others = self._others()
                # Those that do not forward yet, or only for other VMs.
                self._uplinks = sorted(
                    name
                    for name in _with_routes() - {"lo", tap}
                    if _is_plain(name) and (_forwards(name) is False or name in others)
                )
                names = ", ".join(f'"{name}"' for name in self._uplinks)
                elements = f"elements = {{ {names} }}" if names else ""
                self._nft(
                    f"table inet {self.table}; delete table inet {self.table}\n"  # one of a VM that was killed
                    + _RULES.format(table=self.table, tap=tap, network=address, elements=elements)
                )
                for name in (*self._uplinks, tap):
                    _forward(name, True)
        except OSError as error:
            self.close()
            raise ConfigError("nat", tap, f"forwarding cannot be enabled: {error.strerror}") from None

    def _others(self) -> set[str]:
        """Interfaces that forward for other VMs; the tables of VMs that are gone, as their taps are, are taken away."""
        found: set[str] = set()
        for table, elements in _UPLINKS.findall(self._nft("list sets")):
            tap = table.removeprefix(PREFIX)
            if table == self.table or not table.startswith(PREFIX):
                continue
            if not _is_plain(tap) or _forwards(tap) is not None:  # it is there
                found |= set(re.findall(r'"([^"]+)"', elements))
            else:
                self._nft(f"delete table inet {table}")
        return found

    def _nft(self, rules: str) -> str:
        import subprocess

        try:
            done = subprocess.run(["nft", "-f", "-"], input=rules.encode(), capture_output=True)
        except OSError:
            raise ConfigError("nat", self.table, "needs the program nft: apt-get install nftables") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[:1]
            raise ConfigError("nat", self.table, f"nft refuses: {' '.join(said)!r}")
        return done.stdout.decode()

    def close(self) -> None:
        """Put forwarding back, unless another VM needs it, and take the rules away; idempotent."""
        if not self.table:
            return
        try:
            with _alone():
                try:
                    for name in set(self._uplinks) - self._others() if not _forwards("all") else ():
                        if _forwards(name):  # else it is gone
                            _forward(name, False)
                finally:
                    self._nft(f"delete table inet {self.table}")
        except (ConfigError, OSError):
            pass  # somebody has taken the table away before
        self.table = ""


def _alone() -> io.FileIO:
    # A lock of the network namespace, until it is closed: what one VM needs must not change while another looks.
    lock = open("/proc/thread-self/ns/net", "rb", buffering=0)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _is_plain(name: str) -> bool:
    return all(letter.isascii() and (letter.isalnum() or letter in "-_.") for letter in name)


def _with_routes() -> set[str]:
    """The interfaces that IPv4 leaves by."""
    with open("/proc/net/route") as table:
        return {line.split()[0] for line in table.readlines()[1:]}


def _forwards(name: str) -> bool | None:
    try:
        with open(f"{_CONF}/{name}/forwarding") as file:
            return file.read().strip() != "0"
    except OSError:
        return None


def _forward(name: str, on: bool) -> None:
    with open(f"{_CONF}/{name}/forwarding", "w") as file:
        file.write("01"[on])
