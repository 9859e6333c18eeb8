# SPDX-License-Identifier: Apache-2.0
"""Sandboxes with a network policy: what a guest reaches by names, and one that lies about all that a frame can say."""

from __future__ import annotations

import contextlib
import http.server
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.page import Page, own_address
from tests.virtio.net_driver import ipv4, tcp, udp
from tests.virtio.test_net_policy import GATEWAY, ME, ipv6, segment
from tests.virtio.test_net_resolver import Server, addresses
from tests.waiting import until
from virtio.net import dns
from vmm import NetworkPolicy
from vmm.sandbox import Sandbox

# With a name and a port: a page of a server, as glibc finds it. Without: what it reads is sent as frames of eth0, each
# after two bytes of length.
CLIENT = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static int fetch(const char *name, const char *port)
{
    struct addrinfo *found, how = {.ai_socktype = SOCK_STREAM};
    int error = getaddrinfo(name, port, &how, &found), fd, n;
    char page[4096];
    if (error)
        return fprintf(stderr, "%s\n", gai_strerror(error)), 2;
    fd = socket(found->ai_family, SOCK_STREAM, 0);
    if (connect(fd, found->ai_addr, found->ai_addrlen))
        return fprintf(stderr, "%s\n", strerror(errno)), 3;
    dprintf(fd, "GET / HTTP/1.0\r\n\r\n");
    while ((n = read(fd, page, sizeof page)) > 0)
        fwrite(page, 1, n, stdout);
    return 0;
}
int main(int count, char **words)
{
    unsigned char size[2], frame[65536];
    if (count == 3)
        return fetch(words[1], words[2]);
    int fd = socket(AF_PACKET, SOCK_RAW, 0);
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex("eth0"), .sll_halen = 6};
    while (fread(size, 1, 2, stdin) == 2) {
        size_t n = size[0] << 8 | size[1];
        if (fread(frame, 1, n, stdin) != n || sendto(fd, frame, n, 0, (void *)&to, sizeof to) != (ssize_t)n)
            return 1;
    }
    return 0;
}
"""
FAR = "203.0.113.9"
# What it wants of the host's C library.
LIBRARIES = "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("client") / "client"
    subprocess.run(["gcc", "-O2", "-x", "c", "-o", program, "-"], input=CLIENT.encode(), check=True)
    return program


def give(sandbox: Sandbox, client: Path) -> None:
    for path in LIBRARIES:
        sandbox.files.write(path, Path(path).read_bytes(), mode=0o755)
    sandbox.files.write("/bin/client", client.read_bytes(), mode=0o755)


@pytest.fixture(scope="module")
def address() -> str:
    return own_address()


@pytest.fixture(scope="module")
def web(address: str) -> Iterator[int]:
    """The port of a server on all of the host's addresses, whose pages all are one."""
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def names(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's nameserver, and its file of names, for the time of a test."""
    known = {name: [socket.inet_aton(address)] for name in ("good.example", "a.wild.example", "bad.example")}
    with contextlib.ExitStack() as stack:
        records = (
            ("inner.example", dns.A, "127.0.0.1"),
            ("here.wild.example", dns.A, address),
            ("far.wild.example", dns.A, FAR),
        )
        server = Server(stack, addresses(*records))
        monkeypatch.setattr(dns, "nameservers", lambda: [server.address])
        monkeypatch.setattr(dns, "host_names", lambda: known)
        yield


def test_names_that_are_allowed_and_others(
    runtime: Path, names: None, client: Path, address: str, web: int, tmp_path: Path
) -> None:
    policy = NetworkPolicy([f"good.example:{web}", f"*.wild.example:{web}", "inner.example"])
    with Sandbox("busybox", memory="96M", network=policy) as sandbox:
        give(sandbox, client)
        assert sandbox.run("cat /etc/resolv.conf").stdout == "nameserver 10.0.2.3\n"
        said = sandbox.run(f"client {address} {web}")  # nobody has asked for a name that has it
        assert (said.exit_code, said.stderr) == (3, "No route to host\n")
        for name in ("bad.example", "wild.example", "inner.example", "here.wild.example"):
            said = sandbox.run(f"client {name} {web}")
            assert said.exit_code == 2, said
            assert said.duration < 3
        assert sandbox.run(f"client a.wild.example {web}").stdout.endswith("the page\n")
        said = sandbox.run(f"client a.wild.example {web + 1}")
        assert (said.exit_code, said.stderr) == (3, "No route to host\n")
        assert sandbox.run(f"client good.example {web}").stdout.endswith("the page\n")
        assert FAR in sandbox.run("nslookup far.wild.example").stdout
        counters = sandbox.network_counters
        assert counters["dns_refused"] >= 2
        assert counters["dns_own"] >= 2
        assert counters["policy_dropped_address"] >= 2
        assert counters["policy_allowed"] > 10
        with sandbox.fork()[0] as copy:  # by a passt and a resolver of its own, with what was learned
            assert copy.run(f"client {address} {web}").stdout.endswith("the page\n")
            assert copy.run(f"client bad.example {web}").exit_code == 2
            assert copy.network_counters["dns_refused"] >= 1
        sandbox.snapshot(str(tmp_path / "saved"))
    with Sandbox.restore(str(tmp_path / "saved")) as copy:
        assert copy.run(f"client {address} {web}").stdout.endswith("the page\n")
        assert copy.run(f"client {address} {web + 1}").stderr == "No route to host\n"


def test_a_guest_that_lies(runtime: Path, names: None, address: str, web: int, client: Path) -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as door, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as box,
        socket.create_server(("::", 0), family=socket.AF_INET6) as door6,
        Sandbox("busybox", memory="96M", network=NetworkPolicy([f"{address}:{web}"])) as sandbox,
    ):  # fmt: skip
        box.bind(("0.0.0.0", 0))
        port, port_udp, port6 = (each.getsockname()[1] for each in (door, box, door6))
        give(sandbox, client)
        plain = tcp(address, web, source=ME)
        frames = [
            tcp("127.0.0.1", port, source=ME), tcp("0.0.0.0", port, source=ME), tcp("127.0.0.1", web, source=ME),
            tcp(GATEWAY, port, source=ME), tcp(address, port, source=ME), tcp(address, port, source="10.0.2.9"),
            tcp(address, web, source="10.0.2.9"), tcp(address, web, source="127.0.0.1"),
            # A later fragment, whose data passt takes for the ports of a packet.
            tcp(address, port, source=ME, fragment=1), tcp(address, web, source=ME, fragment=0x2000),
            tcp(address, web, source=ME, options=b"\x83\7\4\x7f\0\0\1\0"), ipv4(address, segment(port)[:12], source=ME),
            udp(address, port_udp, source=ME), udp("127.0.0.1", port_udp, source=ME), udp(GATEWAY, 53, source=ME),
            udp("255.255.255.255", port_udp, source=ME, source_port=68), udp("8.8.8.8", 53, source=ME),
            plain[:12] + b"\x81\0\0\1" + plain[12:], plain[:16] + b"\xff\xff" + plain[18:], plain[:30],
            *(ipv6(each, segment(port6), source="fe80::1") for each in ("::1", "::ffff:127.0.0.1", "fe80::1", "::")),
            ipv6("::1", b"\6" + bytes(7) + segment(port6), 0),
            ipv6(f"::ffff:{address}", segment(port), source="fd00::9"),
        ]  # fmt: skip
        before = sandbox.network_counters
        sent = sandbox.run(["client"], input=b"".join(len(each).to_bytes(2, "big") + each for each in frames))
        assert sent.exit_code == 0, sent
        until(
            lambda: sandbox.network_counters["policy_dropped"] >= before["policy_dropped"] + len(frames),
            lambda: sandbox.network_counters,
        )
        counters = sandbox.network_counters
        for reason in ("malformed", "protocol", "options", "fragment", "source", "special", "nameserver", "address"):
            assert counters[f"policy_dropped_{reason}"] > 0, reason
        # It lives, and reaches what it may; what was dropped came nowhere.
        assert sandbox.run(f"client {address} {web}").stdout.endswith("the page\n")
        for each in (door, box, door6):
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.accept() if each is not box else each.recv(9)
