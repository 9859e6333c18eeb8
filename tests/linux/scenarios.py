# SPDX-License-Identifier: Apache-2.0
"""The Linux scenarios: run where KVM runs Linux, one after the other, each writing NAME.json for its test to judge.

    python -m tests.linux.scenarios DIRECTORY [NAME...]

In the lab that is one boot for all of them; on a host with hardware KVM it runs right there.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.guide import programs
from tests.linux import kernels
from vmm import images
from vmm.images import apt, initramfs
from vmm.kvm.vm import runs_linux
from vmm.lab.image import KERNEL_PACKAGE

PYVMM = [sys.executable, "-m", "vmm", "run"]
# A guest that hangs must not eat the whole lab's time; on a busy host one that does not took 100 s there.
PATIENCE = 150
# No two words alike; 1 MiB. In the lab, where a byte costs three exits of a tenth of a millisecond, 16 KiB.
PASTE = b"".join(b"%07d " % i for i in range(1 << (11 if "PYVMM_LAB" in os.environ else 17)))
PASTE_PATIENCE = 200


def _image() -> images.Image:
    image = images.resolve("busybox")
    if image is None:
        raise SystemExit("scenarios: no busybox image; run: pyvmm pull busybox")
    return image


@functools.cache
def _kernel() -> tuple[str, str]:
    # A kernel and an initramfs whose session is the images'.
    if runs_linux():
        image = _image()
        return image.kernel, image.initrd
    initrd = Path(tempfile.mkdtemp(), "session.cpio")
    initrd.write_bytes(kernels.session())
    atexit.register(shutil.rmtree, initrd.parent)
    return kernels.kernel().path, str(initrd)


def _pyvmm(
    *arguments: str, stdin: bytes = b"", command: list[str] | None = None, patience: float = PATIENCE
) -> dict[str, Any]:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command or [*PYVMM, *arguments], input=stdin, capture_output=True,
            timeout=patience,
        )  # fmt: skip
        status, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        status, out, err = 124, late.stdout or b"", late.stderr or b""
    return {
        "status": status,
        "stdout": out.decode(errors="replace"),
        "stderr": err.decode(errors="replace"),
        "seconds": round(time.monotonic() - start, 1),
    }


def _initrd_only(script: str, *arguments: str) -> dict[str, Any]:
    # Without root= the image's initramfs gives a shell of its own: the quickest Linux there is.
    kernel, initrd = _kernel()
    return _pyvmm(kernel, "--initrd", initrd, *arguments, stdin=script.encode())


def disk() -> dict[str, Any]:
    """Root on a virtio disk found through ACPI; what is written and synced is in the image afterwards."""
    image, (kernel, initrd) = _image(), _kernel()
    rootfs = Path(os.environ.get("TMPDIR", "/tmp"), "scenario.ext4")
    shutil.copyfile(image.rootfs, rootfs)
    script = b"""
echo "kernel=$(uname -r)"
echo "cpus=$(nproc)"
echo "memory=$(grep MemTotal /proc/meminfo | tr -dc 0-9)"
echo "root=$(grep ' / ' /proc/mounts)"
echo "virtio=$(ls /sys/bus/virtio/devices | wc -l)"
echo "interrupts=$(grep -c virtio /proc/interrupts)"
echo "clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
seq 1 100000 > /root/written
sync
echo "sum=$(md5sum < /root/written)"
poweroff -f
"""
    result = _pyvmm(
        kernel, str(rootfs), "--initrd", initrd, "--append", image.cmdline, "--cpus", str(kernels.cpus(2)),
        "--memory", "512M", stdin=script,
    )  # fmt: skip
    listing = subprocess.run(["debugfs", "-R", "cat /root/written", str(rootfs)], capture_output=True).stdout
    result["asked"] = kernels.cpus(2)
    result["in_image"] = hashlib.md5(listing).hexdigest()
    result["fsck"] = subprocess.run(["e2fsck", "-fn", str(rootfs)], capture_output=True).returncode
    rootfs.unlink()
    return result


def smp_without_acpi() -> dict[str, Any]:
    """Four CPUs by the MP table, which Debian's cloud kernel cannot read; a reboot is told from a power-off."""
    package = apt.package(KERNEL_PACKAGE)
    kernel, _ = apt.kernel_of(package.tree)
    init = initramfs.LOAD_MODULES + 'echo "cpus=$(nproc)"; echo "acpi=$(ls /sys/firmware/acpi 2>&1)"; reboot -f\n'
    initrd = Path(os.environ.get("TMPDIR", "/tmp"), "scenario.cpio")
    initrd.write_bytes(initramfs.build_initramfs(package.tree, [], init))
    return _pyvmm(str(kernel), "--initrd", str(initrd), "--cpus", "4", "--append", "acpi=off pci=off quiet")


def panic_by_pvh() -> dict[str, Any]:
    """The PVH entry, of a bzImage unpacked here, to a panic."""
    return _initrd_only("echo c > /proc/sysrq-trigger\n", "--protocol", "pvh", "-v")


def exit_port() -> dict[str, Any]:
    """An exit code from the guest's user space."""
    return _initrd_only("/usr/lib/pyvmm/exit 7\n", "--protocol", "linux64", "-v")


def exit_port_by_bzimage() -> dict[str, Any]:
    """The bzImage's own unpacker, and an exit code from the guest's user space."""
    return _initrd_only("/usr/lib/pyvmm/exit 7\n", "--unpack", "never", "-v")


def triple_fault() -> dict[str, Any]:
    """A guest that resets itself by a triple fault."""
    return _initrd_only("reboot -f\n", "--cmdline", "console=ttyS0 reboot=t")


@contextlib.contextmanager
def _session(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    # A guest with a shell of its own, killed if the scenario leaves it.
    kernel, initrd = _kernel()
    process = subprocess.Popen(
        [*PYVMM, kernel, "--initrd", initrd, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _type(process: subprocess.Popen[bytes], line: bytes, until: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()
    heard, end = b"", time.monotonic() + PATIENCE
    while until not in heard:
        if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise subprocess.TimeoutExpired(process.args, PATIENCE, heard)  # the guest stands still: so must not we
        if not (piece := os.read(process.stdout.fileno(), 65536)):
            break
        heard += piece
    return heard


def _finish(
    process: subprocess.Popen[bytes], heard: bytes, stdin: bytes | None = None, patience: float = PATIENCE
) -> dict[str, Any]:
    out, err = process.communicate(stdin, timeout=patience)
    return {
        "status": process.returncode,
        "stdout": (heard + out).decode(errors="replace"),
        "stderr": err.decode(errors="replace"),
    }


def paste() -> dict[str, Any]:
    """1 MiB, in the lab 16 KiB, through the serial port's input, without a byte lost."""
    with _session("--append", "quiet") as process:
        # The quotes keep the echo of the line from looking like its output.
        line = b"stty raw -echo crtscts; echo re''ady; head -c %d | md5sum; poweroff -f" % len(PASTE)
        heard = _type(process, line, b"ready")
        start = time.monotonic()
        result = _finish(process, heard, PASTE, PASTE_PATIENCE)
    return result | {"expected": hashlib.md5(PASTE).hexdigest(), "seconds": round(time.monotonic() - start, 1)}


def idle() -> dict[str, Any]:
    """CPU time of the whole VMM while the guest sleeps, and an end by SIGTERM."""
    with _session("--append", "quiet") as process:
        heard = _type(process, b"echo re''ady; sleep 1000", b"ready")
        time.sleep(2)
        before, start = _cpu_ticks(process.pid), time.monotonic()
        time.sleep(5)
        busy = (_cpu_ticks(process.pid) - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)
        process.send_signal(signal.SIGTERM)
        return _finish(process, heard) | {"busy": busy}


def root_directory() -> dict[str, Any]:
    """A directory as the root file system; what the guest wrote is there afterwards."""
    image = _image()
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["debugfs", "-R", f"rdump / {name}", image.rootfs], capture_output=True, check=True)
        script = b"grep ' / ' /proc/mounts; seq 1 1000 >/root/written; exit 7\n"
        kernel, initrd = _kernel()
        result = _pyvmm(kernel, f"dir:{name}", "--initrd", initrd, "--append", "quiet -- -s", stdin=script)
        written = Path(name, "root", "written")
        return result | {"written": written.read_text() if written.exists() else ""}


def device_guide() -> dict[str, Any]:
    """The device of docs/devices.md in a machine, as the guide has it, but for the image that KVM here runs."""
    device, _, _, machine = programs("devices.md")[:4]
    kernel, initrd = _kernel()
    image = (
        f"import types; from vmm import images\nimage = types.SimpleNamespace(kernel={kernel!r}, initrd={initrd!r})\n"
    )
    script = b"stty -echo; head -c 48 /dev/hwrng | od -An -v -tx1; poweroff -f\n"
    code = f"{device}\n{image}images.resolve = lambda name: image\n{machine}"
    return _pyvmm(command=[sys.executable, "-c", code], stdin=script)


def queues() -> dict[str, Any]:
    """Two queues of disk and network on two CPUs, and the network's module gone and come again."""
    disk = Path(os.environ.get("TMPDIR", "/tmp"), "queues.raw")
    disk.write_bytes(os.urandom(1 << 20) * 8)
    script = b"""
echo "blk=$(ls /sys/block/vda/mq | wc -l)"
echo "net=$(ls /sys/class/net/eth0/queues | wc -l)"
for cpu in 1 2; do taskset $cpu dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | md5sum >/tmp/$cpu & done; wait
echo "sums=$(cat /tmp/1 /tmp/2 | cut -d' ' -f1 | xargs)"
for round in 1 2; do
    ip link set eth0 up; ip addr add 10.8.8.2/24 dev eth0
    echo "ping$round=$(ping -q -c 5 -i 0.2 -W 5 10.8.8.1 | grep -c ' 0% packet loss')"
    rmmod virtio_net; modprobe virtio_net
done
poweroff -f
"""
    options = ("--cpus", "2", "--disk", f"{disk},queues=2", "--net", "auto,addr=10.8.8.1/24,queues=2")
    try:
        return _initrd_only(script.decode(), *options) | {"sum": hashlib.md5(disk.read_bytes()).hexdigest()}
    finally:
        disk.unlink()


def _program(name: str, patience: float) -> dict[str, Any]:
    # Its stdout is a JSON object of what it found; its status is 0 if it came to its end.
    return _pyvmm(command=[sys.executable, "-m", f"tests.linux.{name}"], patience=patience) | {"program": True}


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# Programs beside this one, each told about in its own first lines, and how long one may take.
PROGRAMS = {
    "net_devices": 3 * PATIENCE, "small_devices": 2 * PATIENCE, "keyboard": 2 * PATIENCE, "mmds": 2 * PATIENCE,
    "jailed": 3 * PATIENCE, "same_config": 3 * PATIENCE, "kata": 3 * PATIENCE, "clients": 3 * PATIENCE,
    "stock_sandbox": 3 * PATIENCE,
}  # fmt: skip
SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        function.__name__: function
        for function in (disk, smp_without_acpi, panic_by_pvh, exit_port, exit_port_by_bzimage, triple_fault)
    },
    **{function.__name__: function for function in (root_directory, device_guide, idle, paste, queues)},
    "disk_here": disk,
    **{name: partial(_program, name, patience) for name, patience in PROGRAMS.items()},
}
# What only a stock kernel shows, or several vCPUs. Without KVM that runs them these are the lab's, in one boot.
# And what r3 does not bear: in one of eight pastes its kernel faults ("exited with irqs disabled"), and stands still.
STOCK = ("disk", "smp_without_acpi", "exit_port_by_bzimage", "queues", "paste", "stock_sandbox")


def main(directory: str, *names: str) -> int:
    """Run the scenarios; a scenario's own failure is written down, not raised."""
    for name in names or SCENARIOS:
        try:
            result = SCENARIOS[name]()
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            result = {"status": -1, "stdout": "", "stderr": f"{type(error).__name__}: {error}"}
        Path(directory, f"{name}.json").write_text(json.dumps(result))
        print(f"scenario {name}: status {result['status']}, {result.get('seconds', '-')} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
