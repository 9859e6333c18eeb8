# SPDX-License-Identifier: Apache-2.0
"""Firecracker clients that others wrote boot a Linux by the socket; what its agent says behind vsock port 1024.

python -m tests.linux.clients     # as root, where KVM runs Linux; writes one JSON object
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benches.peers.firecracker import Missing
from tests.api.third_party import ClientFailed, installed, run
from tests.linux.kata import link
from tests.linux.kata_guest import guest
from vmm.images import apt, modules
from vmm.images.host import PullError
from vmm.lab.image import KERNEL_PACKAGE

INIT_MODULE = 175
# What firecracker-python's rules are made of.
NFT = ("nf_tables", "nft_chain_nat", "nft_masq")
PATIENCE = 240
ROOT = "grep ' / ' /proc/mounts"
SIZE = "cat /sys/block/vda/size"
PING = "ip addr add 172.16.0.2/24 dev eth0; ip link set eth0 up; ping -c 1 -W 30 172.16.0.1 | grep -c 'bytes from'"
METADATA = (
    "ip route add 169.254.169.254 dev eth0; "
    r"token=$(printf 'PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n'"
    " | nc -w 20 169.254.169.254 80 | tail -n 1); "
    r'printf "GET /latest/user-data HTTP/1.1\r\nX-metadata-token: $token\r\n\r\n" | nc -w 20 169.254.169.254 80'
    " | tail -n 1"
)


def load_modules() -> None:
    """Give the lab's kernel what a host's has; elsewhere modprobe does it by itself."""
    package = apt.package(KERNEL_PACKAGE)
    _, version = apt.kernel_of(package.tree)
    if version != platform.release():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    first = modules.load_order(package.tree, version, (), optional=("crc32c_generic",))
    for path in (*first, *modules.load_order(package.tree, version, NFT)):
        data = modules.read(path)
        if libc.syscall(INIT_MODULE, data, ctypes.c_ulong(len(data)), b"") and ctypes.get_errno() != errno.EEXIST:
            raise OSError(ctypes.get_errno(), f"module {path.name}: {os.strerror(ctypes.get_errno())}")


def main() -> int:
    """All of them; a failure is written down."""
    load_modules()
    made = guest()

    def boot(client: str, *questions: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            try:
                return run(client, link(directory), made.kernel, made.rootfs, questions, PATIENCE)
            except (ClientFailed, Missing, PullError, OSError) as error:
                return {"failed": f"{type(error).__name__}: {error}"}

    # Both at once: most of the time is imports.
    with ThreadPoolExecutor() as pool:
        ours = {
            "firecracker-python": pool.submit(boot, "firecracker-python", ROOT, SIZE, PING, METADATA),
            "smolvm": pool.submit(boot, "smolvm", ROOT, SIZE),
        }
        found = {client: future.result() for client, future in ours.items()}
    print(json.dumps(found))
    return 1 if any("failed" in each for each in found.values()) else 0


def fetch() -> None:
    """What the lab, which has no network, needs of this and of ``tests.linux.kata``.

    :raises Missing: a client cannot be fetched
    :raises PullError: a Debian package of it cannot be had
    """
    guest()
    installed()
    apt.package("python3-nftables")
    apt.package(KERNEL_PACKAGE)


if __name__ == "__main__":
    sys.exit(main())
