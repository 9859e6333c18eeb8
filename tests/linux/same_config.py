# SPDX-License-Identifier: Apache-2.0
"""One configuration file, a kernel, two VMMs: Firecracker 1.12.1 boots it, pyvmm boots it; what each is like.

python -m tests.linux.same_config      # where KVM runs Linux; writes one JSON object
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches.peers.boot import vmlinux
from benches.peers.common import KVM_CAP_XCRS, lacks_xsave
from benches.peers.firecracker import firecracker
from tests.api.oracle import ALONE, PYVMM, Process
from tests.linux.kernels import cpus, kernel
from vmm.images import initramfs

PATIENCE = 90.0
MODULES = (
    "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon", "vmw_vsock_virtio_transport",
    "af_packet",
)  # fmt: skip
WRITTEN = "written by the guest"
INIT = (
    initramfs.LOAD_MODULES
    + f"""\
echo '<facts>'
echo "cmdline=$(cat /proc/cmdline)"
echo "cpus=$(nproc)"
echo "memory=$(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo)"
echo "devices=$(cat /sys/bus/virtio/devices/*/device | sort | xargs)"
for driver in virtio_balloon virtio_rng vmw_vsock_virtio_transport virtio_blk virtio_net; do
    echo "$driver=$(ls -d /sys/bus/virtio/drivers/$driver/virtio* | wc -l)"
done
for disk in vda vdb vdc; do
    echo "$disk=$(cat /sys/block/$disk/size) $(cat /sys/block/$disk/ro) $(cat /sys/block/$disk/queue/write_cache)"
done
echo '{WRITTEN}' >/dev/vdb && sync && echo "wrote=$(head -n 1 /dev/vdb)"
echo "random=$(head -c 16 /dev/hwrng | wc -c)"
echo "mac=$(cat /sys/class/net/eth0/address)"
ip link set eth0 up && ip addr add 169.254.1.1/16 dev eth0
echo "mmds=$(wget -q -O - http://169.254.169.254/latest/meta-data/)"
echo '</facts>'
reboot -f
"""
)
METADATA = {"latest": {"meta-data": {"ami-id": "ami-1", "hostname": "guest"}}}


def configuration(directory: Path, initrd: Path) -> dict[str, Any]:
    """Every device; paths are relative to the VMM's directory."""
    drive = {"is_root_device": False, "is_read_only": False}
    limits = {"bandwidth": {"size": 1 << 20, "refill_time": 10}, "ops": {"size": 1000, "refill_time": 10}}
    facts: dict[str, Any] = {
        "boot-source": {
            "kernel_image_path": str(directory / "vmlinux"), "initrd_path": str(initrd),
            "boot_args": "console=ttyS0 quiet reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd",
        },
        "drives": [
            {
                **drive, "drive_id": "data", "path_on_host": "data.img", "cache_type": "Writeback",
                "rate_limiter": limits,
            },
            {**drive, "drive_id": "ro", "path_on_host": "ro.img", "is_read_only": True},
            {**drive, "drive_id": "root", "path_on_host": "root.img", "is_root_device": True},
        ],
        "machine-config": {"vcpu_count": cpus(2), "mem_size_mib": 256},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:AC:10:00:02"}],
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"},
        "balloon": {"amount_mib": 8, "deflate_on_oom": True, "stats_polling_interval_s": 1},
        "entropy": {"rate_limiter": limits},
        "mmds-config": {"network_interfaces": ["eth0"], "version": "V1"},
        "logger": {"log_path": "log", "level": "Info", "show_level": True},
        "metrics": {"metrics_path": "metrics"},
    }  # fmt: skip
    if lacks_xsave():
        (directory / "cpu.json").write_text(json.dumps({"kvm_capabilities": [f"!{KVM_CAP_XCRS}"]}))
        facts["cpu-config"] = str(directory / "cpu.json")
    return facts


def boot(command: Sequence[str], directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Start a VMM with that file, ask what it is like, wait for its guest's end."""
    directory.mkdir()
    for name, size in (("data.img", 1 << 20), ("ro.img", 2 << 20), ("root.img", 4 << 20), ("log", 0), ("metrics", 0)):
        (directory / name).write_bytes(b"")
        os.truncate(directory / name, size)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metadata.json").write_text(json.dumps(METADATA))
    options = ("--config-file", "config.json", "--metadata", "metadata.json")
    with Process([*ALONE, *command], directory, options) as process:
        end = time.monotonic() + PATIENCE
        told, state = None, ""
        while state != "Running" and time.monotonic() < end and process.process.poll() is None:
            try:
                state = process.request("GET", "/").json["state"]
                told = process.request("GET", "/vm/config").json
            except (OSError, AssertionError):
                time.sleep(0.05)
        while process.process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        status = process.process.poll()
        sockets = sorted(path.name for path in directory.glob("*.sock"))
    return {
        "status": status, "config": told, "sockets": sockets,
        "console": process.output.read_text(errors="replace"),
        "log": (directory / "log").read_text(errors="replace")[-2000:],
        "metrics": len((directory / "metrics").read_text().splitlines()),
        "written": (directory / "data.img").read_bytes()[: len(WRITTEN)].decode(errors="replace"),
    }  # fmt: skip


def main() -> int:
    made = kernel()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "vmlinux").write_bytes(vmlinux(Path(made.path)) if made.tree else Path(made.path).read_bytes())
        initrd = directory / "initrd"
        initrd.write_bytes(made.initrd(MODULES, INIT))
        binary = directory / "firecracker-1.12.1"
        shutil.copyfile(firecracker(), binary)  # from here it starts as fast as any local program
        binary.chmod(0o755)
        config = configuration(directory, initrd)
        try:
            for vmm, command in (("firecracker", [str(binary)]), ("pyvmm", [*PYVMM])):
                found[vmm] = boot(command, directory / vmm, config)
        finally:
            json.dump(found, sys.stdout)  # what was found before it went wrong, too
    return 0


if __name__ == "__main__":
    sys.exit(main())
