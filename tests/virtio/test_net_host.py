# SPDX-License-Identifier: Apache-2.0
"""The host's side of the network device: taps of whichever kind, NAT, passt, and what a user gets wrong."""

from __future__ import annotations

import errno
import functools
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

from tests.virtio.net_driver import (
    GUEST_MAC,
    HOST,
    TX,
    Vm,
    arp_request,
    checksum,
    is_arp_reply,
    seconds_left,
    tcp,
    verdict_on,
)
from tests.virtio.test_net import is_udp
from tests.virtio.test_net_policy import ipv6, segment
from tests.waiting import until
from virtio.net._policy import Policy
from virtio.net.host import Passt, Tap, parse_address
from vmm.config.devices import NetConfig
from vmm.config.policy import PASST
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
def passt(namespace: None, stack: Any, monkeypatch: pytest.MonkeyPatch) -> Passt:
    """The program, in a namespace with a way out, as it wants one."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # ThreadSanitizer breaks passt's own filter
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


def test_passts_socket_waits_whatever_limit_the_programs_own_have(monkeypatch: pytest.MonkeyPatch) -> None:
    blocking: list[bool] = []

    def popen(*_: object, pass_fds: tuple[int], **__: object) -> None:
        blocking.append(os.get_blocking(*pass_fds))
        raise FileNotFoundError(errno.ENOENT, "passt")

    monkeypatch.setattr(subprocess, "Popen", popen)
    socket.setdefaulttimeout(1)
    try:
        with pytest.raises(ConfigError, match="needs the program passt"):
            Passt()
    finally:
        socket.setdefaulttimeout(None)
    assert blocking == [True]


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
    for number, target in enumerate(("127.0.0.1", "0.0.0.0", "127.1.2.3", "10.7.7.5")):
        vm.send(tcp(target, port, source="10.7.7.9", source_port=4000 + number))
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


def test_what_passt_does_not_like_is_said(namespace: None, stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # ThreadSanitizer breaks passt's own filter
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


@pytest.mark.skipif("PYVMM_SANITIZER" in os.environ, reason="a sanitizer asks the host for what the filter forbids")
def test_the_end_of_passt_is_told_by_a_thread_with_a_filter(tmp_path: Path) -> None:
    passt = tmp_path / "passt"
    passt.write_text("#!/bin/sh\necho not for you >&2\nexit 3\n")
    passt.chmod(0o755)
    code = """
import contextlib
from tests.virtio.net_driver import Vm
from tests.waiting import until
from virtio.net.host import Passt
from vmm.jail import seccomp
with contextlib.ExitStack() as stack:
    passt = Passt()
    stack.callback(passt.close)
    seccomp.guard(alone=False)
    vm = Vm(stack, tap=passt)
    vm.offer()
    until(lambda: vm.log)
    print(*vm.log)
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "virtio-net: passt has ended with 3: not for you; the link is down\n"


def test_without_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="apt-get install passt"):
        Passt()


# passt behind a policy


def learned(address: str, seconds: int) -> Policy:
    """A policy by which the guest 10.0.2.15 asked for a name with this address."""
    guest, gateway, resolver = map(socket.inet_aton, ("10.0.2.15", "10.0.2.2", "10.0.2.3"))
    policy = Policy(guest, gateway, resolver)
    packed = socket.inet_pton(socket.AF_INET6, address if ":" in address else f"::ffff:{address}")
    policy.learn([(packed, 0, 0, seconds)])
    return policy


def checked(vm: Vm, frames: int) -> bool:
    return vm.device.stats["policy_allowed"] + vm.device.stats["policy_dropped"] == frames


def test_no_frame_that_goes_on_begins_a_connection(passt: Passt, stack: Any) -> None:
    """Where an address's time is over, what still passes makes passt connect to nothing: all flags of TCP."""
    server = stack.enter_context(socket.create_server(("10.7.7.5", 0), backlog=600))
    port = server.getsockname()[1]
    vm = Vm(stack, tap=passt, policy=learned("10.7.7.5", 0))
    for flags in range(256):
        vm.send(tcp("10.7.7.5", port, source="10.0.2.15", source_port=4000 + flags, flags=flags))
        if flags % 128 == 127:
            until(functools.partial(checked, vm, flags + 1), lambda: vm.device.stats)
            vm.driver.queues[TX].reap()
    assert vm.device.stats["policy_dropped_address"] == 64
    # An answer to a ping of the cable: passt has seen what came before it.
    vm.offer()
    vm.send(arp_request()[:38] + socket.inet_aton("10.7.7.1"))
    vm.receive(is_arp_reply)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_a_connection_outlives_its_addresses_time(passt: Passt, stack: Any) -> None:
    server = stack.enter_context(socket.create_server(("10.7.7.5", 0)))
    server.settimeout(10)
    port = server.getsockname()[1]
    policy = learned("10.7.7.5", 4)  # seconds, in which it has to be made
    vm = Vm(stack, tap=passt, policy=policy)
    vm.offer()
    vm.send(tcp("10.7.7.5", port, source="10.0.2.15"))
    stream, _ = server.accept()
    _, answer = vm.receive(lambda frame: frame[23] == 6 and frame[34:36] == port.to_bytes(2, "big"))
    theirs = int.from_bytes(answer[38:42], "big") + 1
    until(lambda: not any(seconds_left(policy)))
    assert verdict_on(policy, tcp("10.7.7.5", port, source="10.0.2.15")) == "address"
    for flags, data in ((0x10, b""), (0x18, b"still here")):
        vm.send(tcp("10.7.7.5", port, source="10.0.2.15", flags=flags, number=1001, acknowledged=theirs, data=data))
    stream.settimeout(10)
    assert stream.recv(100) == b"still here"
    stream.close()


def test_ipv6_by_a_policy(passt: Passt, stack: Any) -> None:
    uplink = next(name for name in interfaces() if name.startswith("up"))
    ip("addr", "add", "2001:db8:7::5/64", "dev", uplink, "nodad")
    ip("-6", "route", "add", "default", "via", "2001:db8:7::1", "dev", uplink)
    passt = Passt(PASST)
    stack.callback(passt.close)
    server = stack.enter_context(socket.create_server(("2001:db8:7::5", 0), family=socket.AF_INET6))
    server.settimeout(10)
    vm = Vm(stack, tap=passt, policy=learned("2001:db8:7::5", 60))
    vm.offer()
    solicit = b"\x87\0\0\0" + bytes(4) + socket.inet_pton(socket.AF_INET6, "2001:db8:7::1") + b"\1\1" + GUEST_MAC
    for target in ("ff02::1:ff00:1", "2001:db8:7::6", "2001:db8:7::5"):
        if target.startswith("ff"):
            payload, kind, hops = solicit, 58, 255
        else:
            payload, kind, hops = segment(server.getsockname()[1]), 6, 64
        addresses = socket.inet_pton(socket.AF_INET6, "2001:db8:7::9") + socket.inet_pton(socket.AF_INET6, target)
        found = checksum(addresses + struct.pack(">II", len(payload), kind) + payload)
        at = 2 if kind == 58 else 16
        payload = payload[:at] + struct.pack(">H", found) + payload[at + 2 :]
        vm.send(ipv6(target, payload, kind, source="2001:db8:7::9", hops=hops))
    vm.receive(lambda frame: frame[12:14] == b"\x86\xdd" and frame[20] == 58 and frame[54] == 136)
    stream, _ = server.accept()
    stream.close()
    assert vm.device.stats["policy_dropped_address"] == 1


def test_dhcp_by_a_policy(passt: Passt, stack: Any) -> None:
    passt = Passt(PASST)
    stack.callback(passt.close)
    vm = Vm(stack, tap=passt, policy=learned("9.9.9.9", 60))
    vm.offer()
    vm.send(dhcp_discover())
    _, offer = vm.receive(lambda frame: is_udp(frame) and frame[34:36] == b"\0\x43")
    assert socket.inet_ntoa(offer[58:62]) == "10.0.2.15"
    options = offer[42 + 240 :]
    assert b"\6\4" + socket.inet_aton("10.0.2.3") in options
    assert b"\3\4" + socket.inet_aton("10.0.2.2") in options
    assert b"\1\4" + socket.inet_aton("255.255.255.0") in options
