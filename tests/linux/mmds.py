# SPDX-License-Identifier: Apache-2.0
"""A Linux and busybox's own programs at the metadata service, by V1, then V2; other traffic beside it.

python -m tests.linux.mmds      # where KVM runs Linux; writes one JSON object
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.linux.kernels import kernel
from tests.linux.small_devices import INIT, Guest
from vmm.config.devices import MmdsConfig, NetConfig

MODULES = ("virtio_mmio", "virtio_net", "af_packet")
LARGE = "0123456789abcdef" * 3000
DOCUMENT: dict[str, Any] = {
    "latest": {"meta-data": {"ami-id": "ami-1", "network": {"mac": "06:00"}}},
    "count": 3,
    "large": LARGE,
}
URL = "http://169.254.169.254"
GET = f"wget -q -O - {URL}"
UP = """ip link set eth0 up
ip addr add 10.77.0.2/24 dev eth0
ip route add 169.254.169.254 dev eth0"""
ASK_TOKEN = (
    r"printf 'PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 600\r\nConnection: close\r\n\r\n'"
    " | nc -w 20 169.254.169.254 80 | tail -n 1"
)


def main() -> int:
    made = kernel()
    initrd = Path(os.environ.get("TMPDIR", "/tmp"), "mmds.cpio")
    initrd.write_bytes(made.initrd(MODULES, INIT))
    facts: dict[str, Any] = {}
    net = NetConfig(mode="auto", address="10.77.0.1/24", id="net")
    guest = Guest(made.path, str(initrd), nets=[net], mmds=MmdsConfig(["net"]))
    store = guest.vm.mmds
    store.put(DOCUMENT)
    try:
        guest.run(UP)
        facts["v1"] = {
            "root": guest.run(f"{GET}/"),
            "keys": guest.run(f"{GET}/latest/meta-data/"),
            "value": guest.run(f"{GET}/latest/meta-data/ami-id"),
            "json": guest.run(f"wget -q -O - --header 'Accept: application/json' {URL}/latest"),
            "nowhere": guest.run(f"wget -O - {URL}/nowhere 2>&1"),
            "number": guest.run(f"wget -O - {URL}/count 2>&1"),
            "large": guest.run(f"{GET}/large | md5sum"),
            "again": guest.run(f"for i in $(seq 20); do {GET}/latest/meta-data/ami-id; echo; done | sort | uniq -c"),
            "at_once": guest.run(f"for i in $(seq 4); do {GET}/large | md5sum & done | sort | uniq -c; wait"),
            "arp": guest.run("ip neigh show 169.254.169.254"),
            "another_port": guest.run("nc -w 5 169.254.169.254 81 </dev/null; echo $?"),
        }
        store.patch({"latest": {"meta-data": {"ami-id": "ami-2"}}})
        facts["patched"] = guest.run(f"{GET}/latest/meta-data/ami-id")
        facts["ping"] = guest.run(
            f"(for i in $(seq 8); do {GET}/large; done >/dev/null) & ping -q -i 0.02 -c 50 10.77.0.1; wait"
        )
        store.configure(MmdsConfig(["net"], version="V2"))
        guest.run(f"token=$({ASK_TOKEN})")
        facts["v2"] = {
            "without": guest.run(f"wget -O - {URL}/latest 2>&1"),
            "token": guest.run("echo ${#token}"),
            "value": guest.run(f'{GET}/latest/meta-data/ami-id --header "X-metadata-token: $token"'),
            "aws": guest.run(f'{GET}/latest/meta-data/ --header "X-aws-ec2-metadata-token: $token"'),
            "wrong": guest.run(f'wget -O - {URL}/latest --header "X-metadata-token: x$token" 2>&1'),
        }
        guest.run(f"reload virtio_net; sleep 1\n{UP}")
        facts["reloaded"] = guest.run(f'{GET}/latest/meta-data/ami-id --header "X-metadata-token: $token"')
        facts["stats"] = guest.vm.stats["virtio-net0"]
    finally:
        guest.vm.close()
        json.dump(facts, sys.stdout)  # what was found before it went wrong, too
    return 0


if __name__ == "__main__":
    sys.exit(main())
