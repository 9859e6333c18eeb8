# SPDX-License-Identifier: Apache-2.0
"""What Linux does with the four devices: run where KVM runs Linux, each scenario writing NAME.json for its test.

    python -m tests.linux.device_scenarios DIRECTORY [NAME...]

Needs root, for a tap. One guest with all devices does nearly everything, one thing after the other; it is started
again where a scenario lost it. ``PYVMM_MANY_FILES`` is how many small files there are: 100000, but 4000 for r3.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.linux.kernels import cpus, kernel
from tests.linux.tools_guest import GuestFailed, MachineGuest, ToolsImage, initrd_with, probe, tools_image
from virtio.blk.device import Block
from vmm import Machine
from vmm.config import parse_size
from vmm.config.devices import DriveConfig, NetConfig, ShareConfig, VsockConfig
from vmm.config.vm import VmConfig
from vmm.errors import VmmError
from vmm.kvm.vm import runs_linux

MIB = 1 << 20
DISK = 64 * MIB
MANY_FILES = int(os.environ.get("PYVMM_MANY_FILES") or (100_000 if runs_linux() else 4000))
HOST, GUEST, TAP = "10.78.0.1", "10.78.0.2", "pyvmmtest0"
CONNECTIONS = 200
# Two queues with io_uring, one with plain system calls; found in the guest by their names.
DISKS = {"uring": ("io_uring", 2), "plain": ("sync", 1)}
GUEST_SH = r"""
dev() { for d in /sys/block/vd*; do [ "$(cat $d/serial)" = $1 ] && echo /dev/${d##*/} && return; done; }
virtio() { basename $(dirname $(dirname $(readlink -f /sys/block/$(basename $(dev $1))))); }
"""


def _sh(*command: str, **more: Any) -> str:
    return str(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, **more).stdout)


def _dax(text: str) -> int:
    return parse_size("dax", text)


class World:
    """Host directories, disks and servers, and the guest that has them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = Path(tempfile.mkdtemp(prefix="pyvmm-devices-", dir="/dev/shm"))
        self.image: ToolsImage = tools_image(kernel())
        self.probe = self.files / "probe"
        self.probe.write_bytes(probe())
        self.probe.chmod(0o755)
        self.initrd = initrd_with(
            self.image, self.files / "initrd", {"probe": self.probe.read_bytes(), "devices.sh": GUEST_SH}
        )
        self.share = self.files / "share"
        self.share.mkdir()
        self.fixed = self.files / "fixed"
        self.fixed.mkdir()
        (self.fixed / "kept").write_text("as it was")
        self.disks = {name: self.files / f"{name}.raw" for name in DISKS}
        for path in self.disks.values():
            with path.open("wb") as file:
                file.truncate(DISK)
        self.uds = self.files / "vsock"
        self.guest: MachineGuest | None = None
        self._servers: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, **more: Any) -> MachineGuest:
        """Start a guest with the tools, whose further devices are `more`."""
        root = DriveConfig(str(self.image.rootfs), read_only=True)
        config = VmConfig(
            str(self.image.kernel), initrd=str(self.initrd), cpus=cpus(2), memory="384M",
            drives=[root, *more.pop("drives", [])], **more,
        )  # fmt: skip
        guest = MachineGuest(name, config)
        try:
            guest.wait_ready(100)
        except BaseException:
            guest.close()
            raise
        return guest

    def main(self) -> MachineGuest:
        """The guest with everything, started if it is not there."""
        if self.guest is None:
            subprocess.run(["ip", "link", "del", TAP], capture_output=True, check=False)
            _sh("ip", "tuntap", "add", "dev", TAP, "mode", "tap")
            _sh("ip", "addr", "add", f"{HOST}/24", "dev", TAP)
            _sh("ip", "link", "set", TAP, "up")
            self.guest = self.start(
                "guest",
                drives=[
                    DriveConfig(str(self.disks[name]), id=name, engine=engine, queues=queues)
                    for name, (engine, queues) in DISKS.items()
                ],
                nets=[NetConfig(TAP)],
                vsock=VsockConfig(3, str(self.uds)),
                shares=[
                    ShareConfig("share", str(self.share)),
                    ShareConfig("dax", str(self.share), dax=_dax("64M"), cache="always"),
                    ShareConfig("fixed", str(self.fixed), read_only=True),
                ],
            )  # fmt: skip
            self.guest.ask("mount -t virtiofs share /mnt/a && mount -t virtiofs -o dax=always dax /mnt/b")
            self.guest.ask(f"ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up")
        return self.guest

    def forget(self) -> None:
        """Give up the guest; the next scenario gets another."""
        guest, self.guest = self.guest, None
        if guest is not None:
            guest.close()

    def serve(self, *command: str) -> None:
        """Run a server on this side until the end."""
        self._servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        time.sleep(0.5)

    def close(self) -> None:
        """End everything."""
        self.forget()
        for server in self._servers:
            server.kill()
            server.wait()
        subprocess.run(["ip", "link", "del", TAP], capture_output=True, check=False)
        shutil.rmtree(self.files, ignore_errors=True)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()[-2:]]


def blk_verify(world: World) -> dict[str, Any]:
    """Written and read again by fio, every block with its checksum, on both engines and all queues."""
    guest = world.main()
    fio = (
        "fio --name=v --filename=$(dev {}) --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-64k "
        "--size=12m --numjobs=2 --offset_increment=24m --verify=crc32c --verify_fatal=1 --thread --group_reporting "
        "--eta=never --output-format=terse --terse-version=3 --output=/tmp/v; "
        "r=$?; cut -d';' -f5,6,47 /tmp/v; ( exit $r )"
    )
    facts: dict[str, Any] = {}
    for name in DISKS:
        facts[name] = guest.ask(fio.format(name), 90).splitlines()[-1]  # fio's error, KiB read again, KiB written
        facts[f"{name}_queues"] = int(guest.ask(f"ls /sys/block/$(basename $(dev {name}))/mq | wc -l"))
    return facts


def blk_filesystem(world: World) -> dict[str, Any]:
    """A file system is made, filled, emptied and checked; what it discards is free on this side."""
    guest = world.main()
    path = world.disks["plain"]
    facts: dict[str, Any] = {}
    guest.ask("mkfs.ext4 -q -F $(dev plain) && mkdir -p /tmp/disk && mount $(dev plain) /tmp/disk")
    guest.ask("head -c 24m /dev/urandom >/tmp/disk/file && cp -r /usr/include/linux /tmp/disk && sync", 90)
    facts["full"] = path.stat().st_blocks * 512
    guest.ask("rm /tmp/disk/file && sync && fstrim /tmp/disk && sync")
    facts["trimmed"] = path.stat().st_blocks * 512
    facts["same"] = guest.try_("echo 3 >/proc/sys/vm/drop_caches; diff -r /usr/include/linux /tmp/disk/linux", 90)[0]
    guest.ask("umount /tmp/disk")
    facts["fsck_guest"] = guest.try_("fsck.ext4 -fn $(dev plain)")[0]
    facts["fsck_host"] = subprocess.run(["e2fsck", "-fn", str(path)], capture_output=True).returncode
    guest.ask("blkdiscard -f $(dev plain)")
    facts["discarded"] = path.stat().st_blocks * 512
    return facts


def blk_resize(world: World) -> dict[str, Any]:
    """A disk grows while the guest runs, and the guest hears of it."""
    guest = world.main()
    size = "cat /sys/block/$(basename $(dev uring))/size"
    before = int(guest.ask(size))
    os.truncate(world.disks["uring"], DISK + 16 * MIB)
    device = guest.vm.virtio[1].device  # after the root
    assert isinstance(device, Block)
    device.replace(str(world.disks["uring"]))
    end = time.monotonic() + 20
    while (after := int(guest.ask(size))) == before and time.monotonic() < end:
        time.sleep(0.2)
    write = "echo grown | dd of=$(dev uring) bs=512 seek=$((after - 1)) conv=sync,notrunc oflag=direct 2>&1"
    guest.ask(f"after={after}; {write}")
    with world.disks["uring"].open("rb") as file:
        file.seek(-512, os.SEEK_END)
        last = file.read(5).decode(errors="replace")
    return {"before": before, "after": after, "last": last}


def blk_reload(world: World) -> dict[str, Any]:
    """The driver goes and comes again; the disk is what it was. (Its module stays: the root needs it.)"""
    guest = world.main()
    sums = [guest.ask("md5sum <$(dev uring)", 90)]
    for _ in range(3):
        guest.ask("d=$(virtio uring); cd /sys/bus/virtio/drivers/virtio_blk; echo $d >unbind; echo $d >bind; cd /root")
        sums.append(guest.ask("md5sum <$(dev uring)", 90))
    return {"sums": sums}


def net_traffic(world: World) -> dict[str, Any]:
    """iperf3 both ways, TCP and UDP, with the offloads and without; a flood of pings."""
    guest = world.main()
    facts: dict[str, Any] = {}
    udp = "-u -b 20M -l 1400"
    world.serve(*world.image.iperf3, "-s")
    for offloads in ("on", "off"):
        switch = " ".join(f"{name} {offloads}" for name in ("tx", "sg", "tso", "gso", "gro"))
        guest.ask(f"ethtool -K eth0 {switch}")
        for name, options in (("tcp_out", ""), ("tcp_in", "-R"), ("udp_out", udp), ("udp_in", f"{udp} -R")):
            end = json.loads(guest.ask(f"iperf3 -J -c {HOST} -t 1 {options}", 60))["end"]
            total = end["sum"] if "-u" in options else end["sum_received"]
            facts[f"{name}_{offloads}"] = {"bytes": total["bytes"], "lost": total.get("lost_percent", 0)}
    guest.ask("ethtool -K eth0 tx on sg on tso on gso on gro on")
    facts["ping"] = guest.ask(f"ping -q -f -c 1000 {HOST}", 60)
    facts["ping_large"] = guest.ask(f"ping -q -f -c 200 -s 8000 {HOST}", 60)
    return facts


def net_reload(world: World) -> dict[str, Any]:
    """The network driver's module goes and comes again."""
    guest = world.main()
    again = f"reload virtio_net && ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"
    return {"pings": [guest.ask(f"{again} && ping -q -c 3 -W 5 {HOST}", 60) for _ in range(3)]}


def vsock_connections(world: World) -> dict[str, Any]:
    """Connections by the guest and by the host, all at once, every byte of both directions compared."""
    guest = world.main()
    world.serve(str(world.probe), "serve", f"unix:{world.uds}_7000")
    guest.ask("ulimit -n 4096; { probe serve vsock:4294967295:7001 & }; sleep 1")
    bytes_each = 32768
    by_guest = guest.ask(f"probe check vsock:2:7000 {CONNECTIONS} {bytes_each}", 90)
    command = [str(world.probe), "check", f"hybrid:{world.uds}:7001", str(CONNECTIONS), str(bytes_each)]
    by_host = subprocess.run(command, capture_output=True, text=True, timeout=90)
    return {
        "by_guest": _numbers(by_guest)[1], "by_host": by_host.stdout.split()[-1:], "errors": by_host.stderr,
        "expected": 2 * CONNECTIONS * bytes_each,
    }  # fmt: skip


def vsock_reload(world: World) -> dict[str, Any]:
    """The module goes and comes again, and connections are made as before."""
    guest = world.main()
    guest.try_("pkill probe; sleep 1")
    guest.ask("reload vmw_vsock_virtio_transport")
    return {"bytes": _numbers(guest.ask("probe check vsock:2:7000 8 100000", 60))[1]}


_MAKEFILE = "CC = gcc -O1\nall: prog\nprog: main.o $(patsubst %,f%.o,$(N))\n\t$(CC) -o $@ $^\n"


def _write_project(project: Path) -> None:
    # A program of several files, whose status is 42.
    project.mkdir()
    count = 6
    main = "".join(f"int f{i}(int);" for i in range(count)) + "int main(void){int n=0;"
    main += "".join(f"n+=f{i}({i});" for i in range(count)) + f"return n=={sum(i * i for i in range(count))}?42:1;}}"
    (project / "main.c").write_text(main + "\n")
    for i in range(count):
        (project / f"f{i}.c").write_text(f"#include <stdio.h>\nint f{i}(int x) {{ return x * {i}; }}\n")
    (project / ".gitignore").write_text("*.o\nprog\n")
    (project / "Makefile").write_text(_MAKEFILE.replace("$(N)", " ".join(map(str, range(count)))))


def fs_work(world: World) -> dict[str, Any]:
    """A program is compiled, a repository cloned, an archive unpacked, in the shared directory."""
    guest = world.main()
    _write_project(world.share / "project")
    guest.ask("make -s -C /mnt/a/project", 120)
    facts: dict[str, Any] = {"compiled": guest.try_("/mnt/a/project/prog")[0]}
    git = "git -c user.name=x -c user.email=x@example.org -c init.defaultBranch=main"
    guest.ask(
        f"cd /mnt/a/project && {git} init -q . && {git} add . && {git} commit -q -m first && cd /mnt/a && "
        f"{git} clone -q project clone && git -C clone fsck 2>&1 && "
        "( for file in project/*.c project/Makefile; do cmp $file clone/${file##*/} || exit 1; done ) && cd /root",
        120,
    )
    facts["cloned"] = sorted(path.name for path in (world.share / "clone").glob("*.c"))
    facts["head"] = [
        guest.ask(f"git -c safe.directory='*' -C /mnt/a/{name} rev-parse HEAD") for name in ("project", "clone")
    ]
    guest.ask("tar -cf /tmp/headers.tar -C /usr/include linux && tar -xf /tmp/headers.tar -C /mnt/a", 120)
    facts["unpacked"] = guest.try_("echo 2 >/proc/sys/vm/drop_caches; tar -df /tmp/headers.tar -C /mnt/a", 120)[0]
    return facts


def fs_frozen(world: World) -> dict[str, Any]:
    """A machine is frozen again and again while it compiles on a share. Then a copy finishes what it has begun."""
    home = world.files / "frozen"
    home.mkdir()
    project = home / "project"
    _write_project(project)
    compile_ = "export TMPDIR=/mnt/a; rm -f /mnt/a/project/*.o; make -s -C /mnt/a/project && /mnt/a/project/prog"
    trouble = "dmesg | grep -iE 'bug|error|stall|corrupt|lost|hung' || true"
    facts: dict[str, Any] = {"frozen": 0}
    with world.start("frozen", shares=[ShareConfig("share", str(home))]) as guest:
        guest.ask("mount -t virtiofs share /mnt/a && dmesg -c >/dev/null")
        working = threading.Thread(target=lambda: facts.update(compiled=guest.try_(compile_, 240)[0]))
        working.start()
        while working.is_alive():
            guest.vm.freeze()
            facts["frozen"] += 1
            time.sleep(0.02)
        facts["says"] = guest.ask(trouble)
        guest.tell(compile_)
        while len(list(project.glob("*.o"))) != 3:
            time.sleep(0.001)
        guest.vm.pause()
        with MachineGuest("copy", Machine(image=guest.vm.freeze())) as copy:
            facts["copy_compiled"] = copy.answer(120)[0]
            facts["copy_says"] = copy.ask(trouble)
    return facts


# Each kind of work again and again until there is a file `stop`; what fails is written down.
_WORK_SH = rf"""
. /run/own/devices.sh
again() {{
    turns=0
    until [ -e /mnt/a/stop ]; do
        $1 >/tmp/work/$1 2>&1 || echo "$1: $(tail -c 500 /tmp/work/$1)" >>/tmp/work/failed
        turns=$((turns + 1))
    done
    echo $1 $turns >>/tmp/work/turns
}}
disk() {{
    fio --name=v --filename=$(dev uring) --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-64k \
        --size=4m --verify=crc32c --verify_fatal=1 --thread --eta=never
}}
net() {{ iperf3 -c {HOST} -t 1; }}
sockets() {{ probe check vsock:2:7005 100 2000; }}
build() {{ rm -f /mnt/a/built/*.o; make -s -C /mnt/a/built; /mnt/a/built/prog; [ $? = 42 ]; }}
timer() {{ before=$(cut -d. -f1 /proc/uptime); sleep 0.1; [ $(cut -d. -f1 /proc/uptime) -ge $before ]; }}
mkdir /tmp/work
for each in disk net sockets build timer; do again $each & done
wait
cat /tmp/work/failed 2>/dev/null
sort /tmp/work/turns
"""
FREEZES = 200


def frozen_at_work(world: World) -> dict[str, Any]:
    """A machine is frozen 200 times under fio, iperf3, 100 vsock connections, a compile on a share and timers."""
    guest = world.main()
    guest.try_("umount /mnt/b")  # the DAX window
    world.serve(*world.image.iperf3, "-s")
    world.serve(str(world.probe), "serve", f"unix:{world.uds}_7005")
    _write_project(world.share / "built")
    (world.share / "work.sh").write_text(_WORK_SH)
    guest.ask("dmesg -c >/dev/null")
    guest.tell("bash /mnt/a/work.sh")
    time.sleep(1)
    for _ in range(FREEZES):
        guest.vm.freeze()
        time.sleep(0.03)
    (world.share / "stop").touch()
    said = guest.answer(200)[1].splitlines()
    turns = dict(line.split() for line in said[-5:])
    trouble = guest.ask("dmesg | grep -iE 'bug|error|stall|corrupt|lost|hung' || true")
    guest.ask("mount -t virtiofs -o dax=always dax /mnt/b")
    return {"failed": said[:-5], "turns": turns, "dmesg": trouble}


def fs_read_only(world: World) -> dict[str, Any]:
    """A share that is read-only stays as it is, however its guest mounts it."""
    guest = world.main()
    guest.ask("mkdir -p /tmp/c && mount -t virtiofs -o rw fixed /tmp/c")
    changes = (
        "echo x >/tmp/c/new", "echo x >>/tmp/c/kept", "truncate -s 0 /tmp/c/kept", "rm /tmp/c/kept",
        "mv /tmp/c/kept /tmp/c/other", "ln /tmp/c/kept /tmp/c/hard", "mkdir /tmp/c/d", "chmod 0 /tmp/c/kept",
        "mount -o remount,rw /tmp/c && touch /tmp/c/kept",
    )  # fmt: skip
    return {
        "read": guest.ask("cat /tmp/c/kept"),
        "done": [change for change in changes if guest.try_(f"{change} 2>&1")[0] == 0],
        "here": {path.name: path.read_text() for path in world.fixed.iterdir()},
        "mode": (world.fixed / "kept").stat().st_mode & 0o777,
        "unmounted": guest.try_("umount /tmp/c")[0],
    }


def fs_many_files(world: World) -> dict[str, Any]:
    """Many small files, seen on both sides, and gone from both."""
    guest = world.main()
    count = MANY_FILES
    patience = 120 + count / 20
    made = guest.ask(f"mkdir /mnt/a/many && probe create /mnt/a/many {count}", patience)
    here = len(os.listdir(world.share / "many"))
    there = int(guest.ask("echo 3 >/proc/sys/vm/drop_caches; ls -f /mnt/a/many | wc -l", patience)) - 2
    stats = guest.ask(f"probe stat /mnt/a/many {count}", patience)
    gone = guest.ask(f"probe unlink /mnt/a/many {count} && rmdir /mnt/a/many", patience)
    return {
        "count": count, "here": here, "there": there, "left": (world.share / "many").exists(),
        "created": _numbers(made)[0], "stat": _numbers(stats)[0], "unlinked": _numbers(gone)[0],
    }  # fmt: skip


def fs_mmap(world: World) -> dict[str, Any]:
    """What is written through a mapping is in the file, with DAX and without; fio checks its blocks that way too."""
    guest = world.main()
    facts: dict[str, Any] = {}
    for name in ("a", "b"):
        guest.ask(f"probe map /mnt/{name}/mapped.{name} 3000001")
        guest.ask(
            f"fio --name=m --directory=/mnt/{name} --ioengine=mmap --rw=randwrite --bs=4k --size=4m --verify=crc32c "
            f"--verify_fatal=1 --thread --output=/tmp/m; r=$?; rm -f /mnt/{name}/m.0.0; ( exit $r )", 90,
        )  # fmt: skip
        here = hashlib.md5((world.share / f"mapped.{name}").read_bytes()).hexdigest()
        facts[name] = [here, guest.ask(f"md5sum </mnt/{name}/mapped.{name}").split()[0]]
    facts["mounts"] = guest.ask("grep virtiofs /proc/mounts")
    # No file of /mnt/b is opened on this side: cache=always.
    facts["unlinked"] = guest.ask("cd /mnt/b && echo kept >x && exec 3<x && rm x && cat <&3; exec 3<&-; cd /root")
    facts["cut"] = guest.ask("echo one >/mnt/b/y; echo two >/mnt/b/y; echo three >>/mnt/b/y; cat /mnt/b/y")
    facts["cut_here"] = (world.share / "y").read_text()
    facts["handles"] = [
        link.device.stats["handles"] for link in guest.vm.virtio if getattr(link.device, "tag", "") == "dax"
    ]
    # Which number a file system has that this host's kernel may lack.
    facts["configfs"] = guest.ask("mkdir -p /tmp/d && mount -t configfs d /tmp/d && stat -fc %t /tmp/d; umount /tmp/d")
    return facts


# Not link and symlink, which make 8192 of them before they look at the clock: minutes, in the lab.
STRESSORS = (
    "chdir", "chmod", "dentry", "dir", "dup", "fallocate", "fcntl", "fiemap", "flock", "getdent", "hdd", "io", "lockf",
    "open", "rename", "seek", "sync-file", "touch", "utime", "xattr",
)  # fmt: skip
# Likewise the defaults of these.
LESS = {
    "chdir": "--chdir-dirs 64", "dentry": "--dentries 64", "dir": "--dir-dirs 64", "hdd": "--hdd-bytes 8m",
    "fallocate": "--fallocate-bytes 8m", "seek": "--seek-size 8m", "sync-file": "--sync-file-bytes 8m",
}  # fmt: skip


def fs_stress(world: World) -> dict[str, Any]:
    """stress-ng's file-system stressors, verifying, a second or two of each."""
    guest = world.main()
    seconds = os.environ.get("PYVMM_STRESS_SECONDS", "1")
    guest.ask("mkdir -p /mnt/a/stress")
    facts: dict[str, Any] = {}
    for name in STRESSORS:
        # A buffer of the cache's size: of a server's third level it may be larger than this guest.
        options = f"--cache-level 1 --temp-path /mnt/a/stress --verify --timeout {seconds}"
        command = f"stress-ng {options} --{name} 1 {LESS.get(name, '')}"
        status, said = guest.try_(f"{command} 2>&1", 60 + float(seconds))
        facts[name] = {"status": status, "said": said[-600:] if status else ""}
    facts["left"] = guest.ask("ls -A /mnt/a/stress | wc -l")
    try:
        os.setxattr(world.share, "user.pyvmm", b"")
        facts["xattrs"] = True
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        facts["xattrs"] = False  # tmpfs before Linux 6.6
    return facts


def fs_two_guests(world: World) -> dict[str, Any]:
    """Two guests on one directory see what the other does, and what this side does."""
    guest = world.main()
    with world.start("other", shares=[ShareConfig("share", str(world.share), cache="none")]) as other:
        other.ask("mount -t virtiofs share /mnt/a")
        guest.ask("mkdir -p /mnt/a/both && echo one >/mnt/a/both/file && sync -f /mnt/a")
        seen = [other.ask("cat /mnt/a/both/file")]
        other.ask("echo two >>/mnt/a/both/file && mv /mnt/a/both/file /mnt/a/both/moved")
        time.sleep(1.5)  # the first guest believes a name for a second
        seen.append(guest.ask("cat /mnt/a/both/moved"))
        (world.share / "both/moved").write_text("three\n")
        time.sleep(1.5)
        seen += [guest.ask("cat /mnt/a/both/moved"), other.ask("cat /mnt/a/both/moved")]
        guest.tell("for i in $(seq 100); do echo $i >/mnt/a/both/g$i; done")
        other.ask("for i in $(seq 100); do echo $i >/mnt/a/both/o$i; done", 60)
        guest.answer(60)
        counts = [int(each.ask("ls /mnt/a/both | wc -l")) for each in (guest, other)]
    return {"seen": seen, "counts": counts, "here": len(os.listdir(world.share / "both"))}


def liar(world: World) -> dict[str, Any]:
    """A driver that lies breaks its device alone: the others work on at their speed, and so does it after a reset."""
    guest = world.main()
    work = (
        "fio --name=l --filename=$(dev plain) --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw --bs=4k --size=32m "
        "--time_based --runtime=2 --thread --eta=never --output-format=terse --terse-version=3 "
        "--output=/tmp/l "
        "&& cut -d';' -f5,8,49 /tmp/l"
    )
    facts: dict[str, Any] = {"before": guest.ask(work, 60)}
    device = guest.ask("basename $(dirname $(readlink -f /sys/block/$(basename $(dev uring))/device))")
    facts["device"] = device
    address = guest.ask(f"grep {device} /proc/iomem | head -n 1")
    start = re.match(r"\s*([0-9a-f]+)-", address)
    facts["address"] = address
    if start is None:
        raise GuestFailed(f"no address of {device} in {address!r}")
    guest.ask(f"echo {device} >/sys/bus/platform/drivers/virtio-mmio/unbind")
    facts["lies"] = guest.ask(f"probe lie {start[1]}")  # how often the device said NEEDS_RESET, of how many lies
    facts["after"] = guest.ask(work, 60)
    facts["share"] = guest.ask("echo ok >/mnt/a/liar && cat /mnt/a/liar")
    facts["ping"] = guest.ask(f"ping -q -c 5 -i 0.2 {HOST}")
    guest.ask(f"echo {device} >/sys/bus/platform/drivers/virtio-mmio/bind")
    facts["again"] = guest.ask("dd if=$(dev uring) of=/dev/null bs=1M count=4 iflag=direct 2>&1")
    facts["stats"] = guest.vm.stats
    return facts


SCENARIOS: dict[str, Callable[[World], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        blk_verify, blk_filesystem, blk_resize, blk_reload, net_traffic, net_reload, vsock_connections, vsock_reload,
        frozen_at_work, fs_work, fs_frozen, fs_read_only, fs_many_files, fs_mmap, fs_stress, fs_two_guests, liar,
    )
}  # fmt: skip


def main(directory: str, *names: str) -> int:
    """Run the scenarios; a scenario's own failure is written down, not raised."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the session ends: so does the world
    world = World(Path(directory))
    try:
        for name in names or SCENARIOS:
            start = time.monotonic()
            try:
                result = {"status": 0, **SCENARIOS[name](world)}
            except (GuestFailed, VmmError, OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
                result = {"status": -1, "error": f"{type(error).__name__}: {error}"}
                if isinstance(error, subprocess.CalledProcessError):
                    result["error"] += f"\n{error.stderr}"
                world.forget()
            result["seconds"] = round(time.monotonic() - start, 1)
            Path(directory, f"{name}.json").write_text(json.dumps(result))
            print(f"scenario {name}: status {result['status']}, {result['seconds']} s", flush=True)
            if result["status"]:
                print(result["error"][-3000:], flush=True)
            else:
                print(json.dumps(result)[:2000], flush=True)
    finally:
        world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
