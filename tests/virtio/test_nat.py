# SPDX-License-Identifier: Apache-2.0
"""NAT with real packets: which of a guest's get out, who gets in, and that it does not make the host a router."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.virtio.net_driver import GUEST, GUEST_MAC, HOST, Vm, arp_request, checksum, is_arp_reply
from tests.virtio.test_net import is_udp
from virtio.net.host import Tap
from virtio.net.nat import Nat
from vmm.errors import ConfigError

OUT, NEIGHBOUR = "10.7.7.1", "10.7.7.2"  # behind one interface
LAN, SERVER = "10.6.6.1", "10.6.6.2"  # and behind another
FAR_MAC = bytes.fromhex("020000000077")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def tables() -> str:
    return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout


def forwarding(name: str, value: str | None = None) -> str:
    path = Path(f"/proc/sys/net/ipv4/conf/{name}/forwarding")  # of this namespace
    if value is not None:
        path.write_text(value)
    return path.read_text().strip()


@pytest.fixture
def nft(namespace: None) -> None:
    if shutil.which("nft") is None:
        pytest.fail("LAYER MISSING: nft: apt-get install nftables")


class Wire:
    """An interface of the host's, and the machine at its other end."""

    def __init__(self, stack: Any, address: str, far: str) -> None:
        self.tap = Tap("wire%d", make=True)
        stack.callback(self.tap.close)
        self.tap.configure(address=f"{address}/24")
        self.name = self.tap.name
        self.far = far
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            self.mac = fcntl.ioctl(control, 0x8927, struct.pack("16s24x", self.name.encode()))[18:24]  # SIOCGIFHWADDR
        ip("neigh", "replace", far, "lladdr", FAR_MAC.hex(":"), "dev", self.name)

    def send(self, source: str, target: str, data: bytes, ports: tuple[int, int] = (4000, 53)) -> None:
        os.write(self.tap.fds[0], bytes(12) + self.mac + FAR_MAC + datagram(source, target, data, ports))

    def heard(self, last: bytes) -> list[bytes]:
        """The IPv4 datagrams that came, until the one with the data `last`."""
        frames: list[bytes] = []
        while not frames or not frames[-1].endswith(last):
            assert select.select(self.tap.fds, [], [], 10)[0], frames
            frame = os.read(self.tap.fds[0], 65536)[12:]
            if is_udp(frame):
                frames.append(frame)
        return frames


def datagram(source: str, target: str, data: bytes, ports: tuple[int, int] = (4000, 53)) -> bytes:
    """From the Ethernet type on."""
    udp = struct.pack(">HHHH", *ports, 8 + len(data), 0) + data
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    header = header[:10] + struct.pack(">H", checksum(header + addresses))
    return b"\x08\0" + header + addresses + udp


class Net:
    """A guest, the host, and two more networks of the host's."""

    def __init__(self, stack: Any, *, nat: bool = True) -> None:
        ip("link", "set", "lo", "up")
        self.out, self.lan = Wire(stack, OUT, NEIGHBOUR), Wire(stack, LAN, SERVER)
        self.vm = Vm(stack)
        self.nat = Nat(f"{HOST}/24", self.vm.tap.name) if nat else None
        if self.nat:
            stack.callback(self.nat.close)
        self.vm.offer(256)
        self.vm.send(arp_request())
        _, reply = self.vm.receive(is_arp_reply)
        self.host_mac = reply[6:12]
        ip("neigh", "replace", GUEST, "lladdr", GUEST_MAC.hex(":"), "dev", self.vm.tap.name)

    def send(self, source: str, target: str, data: bytes, ports: tuple[int, int] = (4000, 53)) -> None:
        self.vm.send(self.host_mac + GUEST_MAC + datagram(source, target, data, ports))


@pytest.fixture
def net(nft: None, stack: Any) -> Net:
    return Net(stack)


def test_a_guest_gets_out_by_the_address_of_the_host_and_gets_its_answer(net: Net) -> None:
    net.send(GUEST, NEIGHBOUR, b"data")
    (frame,) = net.out.heard(b"data")
    assert frame[26:34] == socket.inet_aton(OUT) + socket.inet_aton(NEIGHBOUR)
    (port,) = struct.unpack(">H", frame[34:36])
    net.out.send(NEIGHBOUR, OUT, b"answer", (53, port))
    _, answer = net.vm.receive(is_udp)
    assert answer[26:34] == socket.inet_aton(NEIGHBOUR) + socket.inet_aton(GUEST)
    assert answer.endswith(b"answer")


@pytest.mark.parametrize("source", ["10.7.7.9", "1.2.3.4", SERVER, "10.9.7.255", "0.0.0.0"])
def test_a_forged_source_does_not_get_out(net: Net, source: str) -> None:
    # The reverse path filter is the host's own matter.
    for name in ("all", net.vm.tap.name):
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
    net.send(source, NEIGHBOUR, b"forged")
    net.send(GUEST, NEIGHBOUR, b"honest")
    assert len(net.out.heard(b"honest")) == 1


def test_a_forged_source_does_not_reach_the_host(net: Net) -> None:
    for name in ("all", net.vm.tap.name):
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((HOST, 0))
        server.settimeout(10)
        ports = 4000, server.getsockname()[1]
        net.send("1.2.3.4", HOST, b"forged", ports)
        net.send(GUEST, HOST, b"honest", ports)
        assert server.recv(100) == b"honest"


def test_a_neighbour_does_not_get_in(net: Net) -> None:
    net.out.send(NEIGHBOUR, GUEST, b"in", (53, 4001))
    net.send(GUEST, NEIGHBOUR, b"data", (4000, 53))
    frame = net.out.heard(b"data")[-1]
    net.out.send(NEIGHBOUR, OUT, b"answer", (53, struct.unpack(">H", frame[34:36])[0]))
    _, first = net.vm.receive(is_udp)
    assert first.endswith(b"answer")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.sendto(b"from the host", (GUEST, 9))
    _, second = net.vm.receive(is_udp)
    assert second.endswith(b"from the host")


def test_a_rule_of_the_hosts_own_lets_one_in(net: Net) -> None:
    rules = f"""table ip mine {{ chain pre {{ type nat hook prerouting priority dstnat;
        iifname "{net.out.name}" udp dport 8053 dnat to {GUEST}:53
    }}
    }}"""
    subprocess.run(["nft", "-f", "-"], input=rules.encode(), check=True)
    net.out.send(NEIGHBOUR, OUT, b"by the rule", (53, 8053))
    _, frame = net.vm.receive(is_udp)
    assert frame.endswith(b"by the rule")


@pytest.mark.parametrize("before", ["0", "1"])
def test_the_host_is_a_router_as_it_was_before(nft: None, stack: Any, before: str) -> None:
    """From one network of the host's to another, neither of them the guest's."""
    forwarding("all", before)
    net = Net(stack)
    net.out.send(NEIGHBOUR, SERVER, b"through")
    net.send(GUEST, SERVER, b"data")
    heard = net.lan.heard(b"data")
    assert [frame.endswith(b"through") for frame in heard] == ([True, False] if before == "1" else [False])
    assert forwarding("all") == before


def test_no_ipv6_is_forwarded(nft: None, stack: Any) -> None:
    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    net = Net(stack)
    ip("addr", "add", "fd07::1/64", "dev", net.out.name, "nodad")
    ip("addr", "add", "fd09::1/64", "dev", net.vm.tap.name, "nodad")
    ip("neigh", "replace", "fd07::2", "lladdr", FAR_MAC.hex(":"), "dev", net.out.name)
    source, target = (socket.inet_pton(socket.AF_INET6, text) for text in ("fd09::2", "fd07::2"))
    udp = struct.pack(">HHHH", 1, 2, 12, 0) + b"six!"
    udp = udp[:6] + struct.pack(">H", checksum(source + target + struct.pack(">II", 12, 17) + udp)) + udp[8:]
    net.vm.send(
        net.host_mac + GUEST_MAC + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, 12, 17, 64) + source + target + udp
    )
    net.send(GUEST, NEIGHBOUR, b"data")
    deadline = b""
    while not deadline.endswith(b"data"):
        assert select.select(net.out.tap.fds, [], [], 10)[0]
        deadline = os.read(net.out.tap.fds[0], 65536)
        assert not deadline.endswith(b"six!")


# What is left behind


@pytest.mark.parametrize("before", ["0", "1"])
def test_nat_is_made_and_taken_away(nft: None, stack: Any, before: str) -> None:
    forwarding("all", before)
    net = Net(stack, nat=False)
    names = net.out.name, net.lan.name, net.vm.tap.name
    was = [forwarding(name) for name in names]
    nat = Nat(f"{HOST}/24", names[2])
    assert f"table inet pyvmm_{names[2]}" in tables()
    assert [forwarding(name) for name in names] == ["1", "1", "1"]
    assert forwarding("all") == before, "the host is not made a router"
    nat.close()
    nat.close()
    assert tables() == ""
    assert [forwarding(name) for name in names[:2]] == was[:2]


def test_nat_of_two_machines(nft: None, stack: Any) -> None:
    net = Net(stack)
    other = Tap("other%d", make=True)
    stack.callback(other.close)
    other.configure(address="10.5.5.1/24")
    second = Nat("10.5.5.1/24", other.name)
    assert net.nat is not None
    net.nat.close()
    assert forwarding(net.out.name) == "1"  # the other needs it
    net.out.send(NEIGHBOUR, SERVER, b"through")  # and is no router meanwhile
    net.out.send(NEIGHBOUR, "10.5.5.2", b"in")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.sendto(b"last", (SERVER, 53))
    assert len(net.lan.heard(b"last")) == 1
    second.close()
    assert forwarding(net.out.name) == "0"
    assert tables() == ""


def test_nat_left_by_a_killed_machine_is_taken_away(nft: None, stack: Any) -> None:
    wire = Wire(stack, OUT, NEIGHBOUR)
    gone = Tap("gone%d", make=True)
    Nat("10.1.0.1/24", gone.name)
    same = Nat("10.2.0.1/24", gone.name)
    assert tables().count("masquerade") == 1
    assert "10.2.0.0/24" in tables()
    gone.close()  # as its process
    assert same.table in tables()
    other = Tap("tap%d", make=True)
    stack.callback(other.close)
    nat = Nat("10.3.0.1/24", other.name)
    assert same.table not in tables()
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    nat.close()  # somebody else was there before
    assert forwarding(wire.name) == "1" or tables() == ""


def test_an_uplink_that_is_gone_keeps_no_other_forwarding(nft: None, stack: Any) -> None:
    wires = [Wire(stack, f"10.7.{number}.1", f"10.7.{number}.2") for number in range(8)]
    tap = Tap("tap%d", make=True)
    stack.callback(tap.close)
    nat = Nat("10.3.0.1/24", tap.name)
    wires[0].tap.close()
    nat.close()
    assert [forwarding(wire.name) for wire in wires[1:]] == ["0"] * 7


def test_two_machines_that_end_at_once_leave_nothing(nft: None, stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither may take the other's table for one that stays."""
    wire = Wire(stack, OUT, NEIGHBOUR)
    both, nats = threading.Barrier(2), []
    for number in range(2):
        tap = Tap("tap%d", make=True)
        stack.callback(tap.close)
        nats.append(Nat(f"10.3.{number}.1/24", tap.name))
    real = Nat._others

    def others(nat: Nat) -> set[str]:
        found = real(nat)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1)  # where the other looks, too, before either table is gone
        return found

    monkeypatch.setattr(Nat, "_others", others)
    threads = [threading.Thread(target=nat.close) for nat in nats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (forwarding(wire.name), tables()) == ("0", "")


def test_nat_without_nft(namespace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="apt-get install nftables"):
        Nat("10.9.8.1/24", "tap7")


def test_nat_of_odd_names(nft: None) -> None:
    for tap in ('a"b', "a;b", "a}b", "a b"):
        with pytest.raises(ConfigError, match="letters, digits"):
            Nat("10.9.8.1/24", tap)
    assert tables() == ""
