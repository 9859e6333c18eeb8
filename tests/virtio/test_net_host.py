# SPDX-License-Identifier: Apache-2.0
"""The host's side of the network device: taps of whichever kind, NAT, passt, and what a user gets wrong."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.virtio.net_driver import GUEST_MAC, HOST, Vm, arp_request, is_arp_reply, tcp
from tests.virtio.test_net import checksum, is_udp
from virtio.net._policy import Policy
from virtio.net.host import Passt, Tap, network_of, parse_address
from vmm.config.devices import NetConfig
from vmm.errors import ConfigError


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


# Taps


def test_a_tap_of_our_own_is_gone_after_close(namespace: None) -> None:
    tap = Tap("own%d", 2, make=True)
    tap.configure(address="10.9.8.1/24", mtu=9000)
    assert tap.name in interfaces()
    said = subprocess.run(["ip", "addr", "show", tap.name], capture_output=True, text=True, check=True).stdout
    assert "10.9.8.1/24" in said
    assert "mtu 9000" in said
    assert ",UP" in said
    tap.close()
    tap.close()
    assert tap.name not in interfaces()


@pytest.mark.parametrize("options", [[], ["multi_queue"]])
def test_a_tap_made_by_ip_is_taken_and_stays(namespace: None, stack: Any, options: list[str]) -> None:
    ip("tuntap", "add", "tap7", "mode", "tap", *options)
    tap = Tap("tap7", 2 if options else 1)
    assert len(tap.fds) == 2 if options else 1
    tap.close()
    tap = Tap("tap7")  # one queue of either
    tap.close()
    assert "tap7" in interfaces()


def test_names_that_are_no_tap(namespace: None) -> None:
    ip("tuntap", "add", "tap7", "mode", "tap")
    ip("tuntap", "add", "tun7", "mode", "tun")
    for name, said in (
        ("tap8", "does not exist"),
        ("lo", "is not a tap"),
        ("tun7", "is not a tap"),
        ("a" * 16, "must be the name of an interface"),
        ("", "must be the name of an interface"),
        ("a/b", "must be the name of an interface"),
    ):
        with pytest.raises(ConfigError, match=said):
            Tap(name)
    with pytest.raises(ConfigError, match="another number of queues"):
        Tap("tap7", 2)
    with pytest.raises(ConfigError, match="is in use"):
        Tap("tap7", make=True)
    assert interfaces() == {"lo", "tap7", "tun7"}
    first = Tap("tap7")
    with pytest.raises(ConfigError, match="is in use"):
        Tap("tap7")
    first.close()


def test_without_the_capability_it_is_one_line_that_says_so(namespace: None) -> None:
    code = """if 1:
        import os
        from virtio.net.host import Tap
        from vmm.errors import ConfigError
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        for options in {"make": True}, {}:
            try:
                Tap("tap7", **options)
            except ConfigError as error:
                print(error)
    """
    ip("tuntap", "add", "tap7", "mode", "tap")
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("CAP_NET_ADMIN" in line for line in lines)


def test_an_inherited_descriptor(namespace: None, stack: Any) -> None:
    theirs = Tap("t%d", make=True)
    theirs.configure(address=f"{HOST}/24")
    tap = Tap.inherited(os.dup(theirs.fds[0]))
    theirs.close()
    assert tap.name in interfaces()
    vm = Vm(stack, tap=tap)
    vm.offer()
    vm.send(arp_request())
    vm.receive(is_arp_reply)
    assert not os.get_inheritable(tap.fds[0])
    stack.close()  # the device first: its thread uses the descriptor
    tap.close()
    assert tap.name not in interfaces()


def test_inherited_descriptors_that_are_no_tap(namespace: None, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "file").open("wb") as file, pytest.raises(ConfigError, match="is not a tap"):
        Tap.inherited(file.fileno())
    with pytest.raises(ConfigError, match="is not a tap: Bad file"):
        Tap.inherited(1 << 19)
    fd = os.open("/dev/net/tun", os.O_RDWR)
    with pytest.raises(ConfigError, match="is not a tap"):
        Tap.inherited(fd)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"plain", 0x1002))
    with pytest.raises(ConfigError, match="IFF_VNET_HDR"):
        Tap.inherited(fd)
    os.close(fd)


@pytest.mark.parametrize("text", ["10.0.0.1", "10.0.0.1/", "10.0.0/24", "10.0.0.1/31", "10.0.0.1/x", "::1/64", ""])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1/24"):
        parse_address(text)


def test_network_of_an_address() -> None:
    assert network_of("10.9.8.7/24") == "10.9.8.0/24"
    assert network_of("10.9.8.7/30") == "10.9.8.4/30"
    assert network_of("192.168.255.1/8") == "192.0.0.0/8"


@pytest.mark.parametrize(
    "text",
    ["", "tap=", "tap=a,auto", "user,queues=2", "tap=a,addr=10.0.0.1/24", "auto,nat", "fd=x", "fd=-1", "auto,queues=9",
     "auto,mtu=20", "tap=a,nothing=1", "wan", "fd=3,queues=2", "tap=a,rx_bps=x"],
)  # fmt: skip
def test_options_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        NetConfig.parse(text)


def test_options_that_are_taken() -> None:
    net = NetConfig.parse("auto,addr=10.0.0.1/24,nat,queues=2,mtu=9000,mac=06:00:ac:10:00:02,rx_bps=1000000")
    assert (net.mode, net.address, net.nat, net.queues, net.mtu) == ("auto", "10.0.0.1/24", True, 2, 9000)
    assert net.rx_rate_limiter is not None
    assert net.tx_rate_limiter is None
    assert NetConfig.parse("fd=7").fd == 7
    assert NetConfig.parse("user").mode == "user"


# passt


@pytest.fixture
def passt(namespace: None, stack: Any) -> Passt:
    """The program, in a namespace with a way out, as it wants one."""
    if shutil.which("passt") is None:
        pytest.fail("LAYER MISSING: passt: apt-get install passt")
    ip("link", "set", "lo", "up")
    uplink = Tap("up%d", make=True)
    stack.callback(uplink.close)
    uplink.configure(address="10.7.7.5/24")
    ip("route", "add", "default", "via", "10.7.7.1", "dev", uplink.name)
    passt = Passt()
    stack.callback(passt.close)
    return passt


def dhcp_discover() -> bytes:
    bootp = struct.pack(">BBBBIHHIIII", 1, 1, 6, 0, 0x1234, 0, 0x8000, 0, 0, 0, 0) + GUEST_MAC + bytes(10 + 64 + 128)
    bootp += b"\x63\x82\x53\x63" + b"\x35\1\1" + b"\x37\3\1\3\6" + b"\xff"
    bootp = bootp.ljust(300, b"\0")
    udp = struct.pack(">HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    addresses = bytes(4) + b"\xff" * 4
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    header = header[:10] + struct.pack(">H", checksum(header + addresses))
    return b"\xff" * 6 + GUEST_MAC + b"\x08\0" + header + addresses + udp


@pytest.mark.parametrize("without", [0, 1 << 15])
def test_passt_gives_an_address_and_answers_arp(passt: Passt, stack: Any, without: int) -> None:
    vm = Vm(stack, tap=passt, without=without)
    vm.offer()
    vm.send(dhcp_discover())
    _, offer = vm.receive(lambda frame: is_udp(frame) and frame[34:36] == b"\0\x43")
    assert socket.inet_ntoa(offer[42 + 16 : 42 + 20]) == "10.7.7.5"  # the host's own, which is passt's way
    vm.send(arp_request()[:38] + socket.inet_aton("10.7.7.1"))
    _, reply = vm.receive(is_arp_reply)
    assert reply[28:32] == socket.inet_aton("10.7.7.1")
    assert vm.device.stats["tx_packets"] == 2
    assert vm.device.stats["rx_packets"] >= 2
    vm.bring_up(without=without)  # another driver over the same stream
    vm.offer()
    vm.send(arp_request()[:38] + socket.inet_aton("10.7.7.1"))
    vm.receive(is_arp_reply)


@pytest.mark.parametrize("loopback", [False, True])
def test_the_gateway_is_the_hosts_loopback_only_where_that_is_asked_for(
    passt: Passt, stack: Any, loopback: bool
) -> None:
    """A datagram to the gateway's address."""
    if loopback:
        passt = Passt(loopback=True)
        stack.callback(passt.close)
    server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.bind(("127.0.0.1", 0))
    server.settimeout(10 if loopback else 0.5)
    vm = Vm(stack, tap=passt)
    vm.offer()
    vm.send(dhcp_discover())
    vm.receive(lambda frame: is_udp(frame) and frame[34:36] == b"\0\x43")
    vm.send(arp_request()[:38] + socket.inet_aton("10.7.7.1"))
    _, reply = vm.receive(is_arp_reply)
    udp = struct.pack(">HHHH", 4000, server.getsockname()[1], 8 + 4, 0) + b"data"
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    addresses = socket.inet_aton("10.7.7.5") + socket.inet_aton("10.7.7.1")
    header = header[:10] + struct.pack(">H", checksum(header + addresses))
    vm.send(reply[6:12] + GUEST_MAC + b"\x08\0" + header + addresses + udp)
    if loopback:
        assert server.recv(100) == b"data"
    else:
        with pytest.raises(TimeoutError):
            server.recv(100)


def test_a_guest_that_names_the_hosts_loopback_does_not_reach_it(passt: Passt, stack: Any) -> None:
    """By frames that no kernel would send: passt takes a packet to 127.0.0.1 for what it says."""
    server = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
    server.settimeout(10)
    port = server.getsockname()[1]
    vm = Vm(stack, tap=passt, policy=Policy(only_special=True))
    for place, target in enumerate(("127.0.0.1", "0.0.0.0", "127.1.2.3", "10.7.7.5")):
        vm.send(tcp(target, port, source="10.7.7.9", source_port=4000 + place))
    stream, peer = server.accept()
    stream.close()
    assert peer[0] == "10.7.7.5"  # the last of them was the first
    assert vm.device.stats["policy_dropped_special"] == 3


def test_the_end_of_passt_pulls_the_cable(passt: Passt, stack: Any) -> None:
    vm = Vm(stack, tap=passt)
    vm.offer()
    vm.send(dhcp_discover())
    vm.receive(is_udp)
    assert vm.driver.config(6, 2) == b"\1\0"
    passt._process.kill()
    passt._process.wait()
    for _ in range(1000):
        if vm.driver.config(6, 2) == b"\0\0":
            break
        threading.Event().wait(0.01)
    for _ in range(20):
        vm.send(dhcp_discover())
    assert vm.log == ["virtio-net: passt has ended with -9; the link is down"]
    vm.bring_up()
    assert vm.driver.config(6, 2) == b"\0\0"


def test_what_passt_does_not_like_is_said(namespace: None, stack: Any) -> None:
    if shutil.which("passt") is None:
        pytest.fail("LAYER MISSING: passt: apt-get install passt")
    passt = Passt(("--no-such-option",))
    stack.callback(passt.close)
    vm = Vm(stack, tap=passt)
    vm.offer()
    for _ in range(1000):
        if vm.driver.config(6, 2) == b"\0\0":
            break
        threading.Event().wait(0.01)
    assert len(vm.log) == 1
    assert "passt has ended with 1: " in vm.log[0]


def test_without_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="apt-get install passt"):
        Passt()
