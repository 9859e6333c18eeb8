# SPDX-License-Identifier: Apache-2.0
"""systemd's ssh proxy, of Debian 13 and unmodified, as a client of the socket device: ``ssh vsock-mux/PATH``."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.virtio.vsock_driver import REQUEST, RESPONSE, RW, Vm, read_line
from tests.waiting import PATIENCE
from vmm.images import apt
from vmm.images.host import PullError
from vmm.memory import GuestMemory

# With what it is linked to, because another Debian's libraries are too old.
PACKAGES = (
    "systemd", "libc6", "libsystemd-shared", "libacl1", "libaudit1", "libblkid1", "libcap2", "libcap-ng0", "libcrypt1",
    "libgcc-s1", "libmount1", "libpcre2-8-0", "libseccomp2", "libselinux1", "libssl3t64",
)  # fmt: skip
SSH = 22


def _proxy() -> list[str]:
    try:
        trees = [package.tree for package in apt.packages(PACKAGES, suite="trixie")]
    except PullError as error:
        pytest.fail(f"LAYER MISSING: linux: systemd's ssh proxy: {error}", pytrace=False)
    libraries = [str(tree / "usr/lib/x86_64-linux-gnu" / sub) for tree in trees for sub in ("", "systemd")]
    loader = trees[1] / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", ":".join(libraries), str(trees[0] / "usr/lib/systemd/systemd-ssh-proxy")]


def test_ssh_gets_a_connection_from_systemds_proxy(tmp_path: Path) -> None:
    proxy = _proxy()
    with GuestMemory(4 << 20) as ram:
        vm = Vm(tmp_path / "v", ram)
        ours, theirs = socket.socketpair()
        try:
            words = [*proxy, f"vsock-mux/{tmp_path}/v", str(SSH)]
            with subprocess.Popen(words, stdout=theirs.fileno(), stderr=subprocess.PIPE) as process:
                wanted = vm.receive(REQUEST)
                assert wanted.dst_port == SSH
                vm.send(RESPONSE, SSH, wanted.src_port)
                ours.settimeout(PATIENCE)
                _, descriptors, _, _ = socket.recv_fds(ours, 16, 1)  # as ssh does with ProxyUseFdpass
                assert len(descriptors) == 1
                with socket.socket(fileno=descriptors[0]) as connection:
                    assert process.wait(PATIENCE) == 0
                    connection.sendall(b"SSH-2.0-client\r\n")
                    assert vm.receive(RW).data == b"SSH-2.0-client\r\n"
                    vm.send(RW, SSH, wanted.src_port, b"SSH-2.0-server\r\n")
                    connection.settimeout(PATIENCE)
                    # The proxy leaves the answer to CONNECT to ssh, which skips lines before a version (RFC 4253, 4.2).
                    assert re.fullmatch(rb"OK \d+\n", read_line(connection))
                    assert read_line(connection) == b"SSH-2.0-server\r\n"
        finally:
            ours.close()
            theirs.close()
            vm.close()
