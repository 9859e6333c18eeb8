# SPDX-License-Identifier: Apache-2.0
"""A Linux in a jail, every thread behind its seccomp filter: disk, network, sockets and a share at work.

    python -m tests.linux.jailed      # where KVM runs Linux, as root; writes one JSON object

The jail is made by the command that a runtime types and driven by the API's socket; the guest is asked over vsock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.jail.jailed import UID, Jailed
from tests.linux import kernels
from tests.linux.kata_guest import AGENT
from vmm.images import initramfs

PATIENCE = 150.0
MODULES = (
    "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon", "virtiofs", "ext4", "af_packet",
    "vmw_vsock_virtio_transport",
)  # fmt: skip
INIT = initramfs.LOAD_MODULES + "exec /agent\n"
NETWORK = f"pyvmm-jailed-{os.getpid()}"
CMDLINE = "console=ttyS0 quiet panic=-1"
MIB = 1 << 20
DATA = os.urandom(4 * MIB)
DISK = """
dd if=/s/input of=/dev/vda bs=1M conv=fsync 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches
head -c 4194304 /dev/vda | md5sum
mke2fs -F /dev/vda >/dev/null; mkdir -p /d; mount -t ext4 /dev/vda /d && cp /s/input /d/copy && umount /d
mount -t ext4 /dev/vda /d && md5sum /d/copy && umount /d
"""
SHARE = """
mkdir -p /s; mount -t virtiofs tag /s && md5sum /s/input; cp /s/input /s/output && sync
mkdir /s/many; for i in $(seq 200); do echo $i >/s/many/$i; done; ls /s/many | wc -l; cat /s/many/* | wc -l
mv /s/many/1 /s/many/one; ln -s one /s/many/link; cat /s/many/link; chmod 600 /s/many/one; rm /s/many/2
ls /s/../etc/passwd 2>&1 | wc -l
"""
NET = "ip link set eth0 up; ip addr add 10.99.0.2/24 dev eth0; ping -q -c 50 -i 0.02 10.99.0.1"


class Agent:
    """The shell behind the guest's port 1024."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(PATIENCE)
            with contextlib.suppress(OSError):
                self._socket.connect(str(path))
                self._socket.sendall(b"CONNECT 1024\n")
                self._lines = self._socket.makefile("rb")
                if self._lines.readline().startswith(b"OK "):
                    return
            self._socket.close()
            if time.monotonic() > deadline:
                raise TimeoutError("the guest's agent does not answer")
            time.sleep(0.5)

    def run(self, commands: str) -> str:
        """What `commands` print."""
        line = "; ".join(commands.strip().splitlines())
        self._socket.sendall(line.encode() + b"\n")
        return self._lines.readline().decode(errors="replace").strip().replace("|", "\n")


def exercise(jail: Jailed, facts: dict[str, Any]) -> None:
    """From the first request to the guest's end."""
    jail.start("--netns", f"/run/netns/{NETWORK}", "--new-pid-ns")
    drive = {"drive_id": "d", "path_on_host": "/disk", "is_root_device": False, "is_read_only": False}
    for path, body in (
        ("/boot-source", {"kernel_image_path": "/kernel", "initrd_path": "/initrd", "boot_args": CMDLINE}),
        ("/machine-config", {"vcpu_count": kernels.cpus(2), "mem_size_mib": 256}),
        ("/drives/d", drive | {"io_engine": "Async"}),
        ("/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": "tap0"}),
        ("/vsock", {"guest_cid": 3, "uds_path": "/v"}),
        ("/balloon", {"amount_mib": 16, "deflate_on_oom": True, "stats_polling_interval_s": 1}),
        ("/entropy", {}),
        ("/fs/tag", {"tag": "tag", "shared_dir": "/share"}),
        ("/actions", {"action_type": "InstanceStart"}),
    ):  # fmt: skip
        answer = jail.request("PUT", path, body)
        if answer[0] != 204:
            raise ValueError(f"PUT {path}: {answer}")
    agent = Agent(jail.root / "v")
    facts["share"] = agent.run(SHARE)
    facts["disk"] = agent.run(DISK)
    facts["net"] = agent.run(NET)
    facts["rng"] = agent.run("head -c 64 /dev/hwrng | wc -c")
    facts["patch"] = jail.request("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "/other"})[0]
    facts["sectors"] = agent.run("sleep 1; cat /sys/block/vda/size")
    facts["reloaded"] = agent.run("reload virtio_net; sleep 1; " + NET)
    facts["balloon"] = jail.request("GET", "/balloon/statistics")[1]
    facts["threads"] = {
        (task / "comm").read_text().strip(): (task / "status").read_text().partition("\nSeccomp:\t")[2][0]
        for task in Path(f"/proc/{jail.pid}/task").iterdir()
    }
    output = jail.root / "share/output"
    facts["output"] = [hashlib.md5(output.read_bytes()).hexdigest(), output.stat().st_uid]
    pid = jail.pid
    os.kill(pid, signal.SIGTERM)
    start = time.monotonic()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
            if time.monotonic() - start > 20:
                raise TimeoutError("SIGTERM did not end it")
            time.sleep(0.01)
    facts["end_seconds"] = time.monotonic() - start


def main() -> int:
    facts: dict[str, Any] = {"md5": hashlib.md5(DATA).hexdigest()}
    base = Path(tempfile.mkdtemp(prefix="jail-"))
    jail = Jailed(base)
    agent = base / "agent"
    subprocess.run(["gcc", "-O2", "-w", "-static", "-o", agent, AGENT], check=True)
    made = kernels.kernel()
    jail.put("kernel", Path(made.path))
    jail.put("initrd", made.initrd(MODULES, INIT, {"agent": agent.read_bytes()}))
    jail.put("disk", bytes(32 * MIB))
    jail.put("other", bytes(48 * MIB))
    jail.put("share/input", DATA)
    subprocess.run(["ip", "netns", "add", NETWORK], check=True)
    try:
        for words in (f"tuntap add tap0 mode tap user {UID}", "addr add 10.99.0.1/24 dev tap0", "link set tap0 up"):
            subprocess.run(["ip", "-n", NETWORK, *words.split()], check=True)
        exercise(jail, facts)
    except (OSError, ValueError, AssertionError) as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    finally:
        jail.close()
        if jail.process is not None and "error" in facts:
            facts["said"] = [text[-2000:] for text in jail.process.communicate(timeout=20)]
        subprocess.run(["ip", "netns", "del", NETWORK], check=True)
    json.dump(facts, sys.stdout)
    return 1 if "error" in facts else 0


if __name__ == "__main__":
    sys.exit(main())
