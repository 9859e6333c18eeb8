# SPDX-License-Identifier: Apache-2.0
"""The part of the device tables that runs where KVM runs Linux.

    python -m benches.peers.devices_inside DIRECTORY TABLE [PHASE...]

All VMMs of a table are up side by side with the same guest, and one after the other does the same phase of work, again
and again, while the others idle. Each time adds a line to the directory's file ``runs``. Needs root, for taps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benches.peers import common, native
from benches.peers.common import PYVMM
from benches.peers.firecracker import Missing, firecracker
from tests.linux.tools_guest import CMDLINE as STOCK_CMDLINE
from tests.linux.tools_guest import Guest, GuestFailed

CMDLINE = native.CMDLINE if native.here() else STOCK_CMDLINE
QEMU_CPU, QEMU_MACHINE = (native.QEMU_CPU, native.QEMU_MACHINE) if native.here() else ("host", "microvm")
MEMORY_MIB = 256
DISK_MIB = 128
CPUS = 4  # where there are several queues
FILE_MIB = 64
DAX_MIB = 128
RUNTIME = float(os.environ.get("PYVMM_BENCH_SECONDS", "2"))
REPEATS = int(os.environ.get("PYVMM_BENCH_REPEATS", "3"))
FILES = 500
PATIENCE = 60.0
SHM = Path("/dev/shm/pyvmm-devices")
VHOST_VSOCK = "/dev/vhost-vsock"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"

# What the guests know to do; each prints units a second, and units in all.
GUEST_SH = rf"""
RUNTIME={RUNTIME:g}
disk() {{ for d in /sys/block/vd*; do [ "$(cat $d/ro)" = 0 ] && echo /dev/${{d##*/}} && return; done; }}
# Of a fraction of a second fio knows nothing without a unit: it would do the whole file.
measure() {{
    ms=$(awk "BEGIN {{ print $RUNTIME * 1000 }}")
    fio --name=x --thread --time_based --runtime="${{ms}}ms" --gtod_reduce=1 --randrepeat=1 --norandommap \
        --disk_util=0 --exec_prerun='mark go' --exec_postrun='mark stop' --output-format=terse --terse-version=3 \
        --output=/tmp/fio "$@" >/dev/null || {{ cat /tmp/fio; return 1; }}
    awk -F';' '/^3;/ {{ print $8 + $49, ($8 * $9 + $49 * $50) / 1000 }}' /tmp/fio
}}
# blk WAY SIZE DEPTH OPTION...
blk() {{
    rw=$1 bs=$2 depth=$3
    shift 3
    measure --filename=$(disk) --direct=1 --ioengine=libaio --rw=$rw --rwmixread=70 --bs=$bs --iodepth=$depth "$@"
}}
# A job for each CPU, which each would mark its own begin and end.
blk_jobs() {{ timed blk "$@" --numjobs={CPUS} --group_reporting --exec_prerun=true --exec_postrun=true; }}
fs() {{ measure --filename=/mnt/a/big --size={FILE_MIB}m --ioengine=psync --rw=$1 --bs=$2 --direct=${{3-1}}; }}
# A second of it first, unmeasured: the emulated machine translates what it runs for the first time.
warm() {{
    export NO_MARK=1 RUNTIME=1
    eval "$*" >/dev/null
    result=$?
    unset NO_MARK
    RUNTIME={RUNTIME:g}
    return $result
}}
timed() {{ mark go; said=$("$@" 2>&1); result=$?; mark stop; echo "$said"; return $result; }}
create() {{ rm -rf /mnt/a/small; mkdir /mnt/a/small && timed probe create /mnt/a/small {FILES}; }}
# pace COUNT COMMAND...: how fast it does that many.
pace() {{
    count=$1
    shift
    mark go
    start=$(date +%s.%N)
    "$@" >/dev/null
    result=$?
    end=$(date +%s.%N)
    mark stop
    [ $result = 0 ] && awk "BEGIN {{ print $count / ($end - $start), $count }}"
}}
extract() {{ tar -xf /tmp/headers.tar -C /mnt/a/unpacked && sync -f /mnt/a; }}
unpack() {{
    rm -rf /mnt/a/unpacked && mkdir /mnt/a/unpacked || return
    pace "$(tar -tf /tmp/headers.tar | grep -vc '/$')" extract
}}
clone() {{
    rm -rf /mnt/a/clone
    pace "$(git -C /tmp/repo ls-files | wc -l)" git clone -q --no-hardlinks /tmp/repo /mnt/a/clone
}}
find_again() {{
    [ -d /mnt/a/found ] || {{ mkdir /mnt/a/found && tar -xf /tmp/headers.tar -C /mnt/a/found; }}
    echo 3 >/proc/sys/vm/drop_caches
    pace "$(tar -tf /tmp/headers.tar | wc -l)" find /mnt/a/found -size +1000000
}}
compile() {{
    rm -rf /mnt/a/source && mkdir /mnt/a/source && cd /mnt/a/source || return
    for i in 1 2 3 4; do
        echo "#include <stdio.h>
            #include <linux/kvm.h>
            int f$i(void) {{ return printf(\"%d\", $i) + sizeof(struct kvm_sregs); }}" >f$i.c
    done
    echo 'int main(void) {{ return 0; }}' >main.c
    pace 5 gcc -O1 -o program f1.c f2.c f3.c f4.c main.c
    result=$?
    cd /
    return $result
}}
open_again() {{
    [ -d /mnt/a/again ] || {{ mkdir /mnt/a/again && probe create /mnt/a/again 50 >/dev/null; }}
    timed probe again /mnt/a/again 50 $RUNTIME
}}
# Of iperf3, and of ping, a whole number of seconds.
seconds() {{ awk "BEGIN {{ print int($RUNTIME + 0.999) }}"; }}
iperf() {{
    mark go
    iperf3 -J -c $HOST -t $(seconds) -P "$@" >/tmp/iperf
    result=$?
    mark stop
    [ $result = 0 ] || {{ cat /tmp/iperf; return 1; }}
    awk -F'[:,]' '/"sum_received"/ {{ found = 1 }} found && /"seconds"/ {{ took = $2 }} found && /"bytes"/ {{ n = $2 }}
        found && /"bits_per_second"/ {{ print n / took, n; exit }}
        END {{ if (!took) {{ print "no sum"; exit 1 }} }}' /tmp/iperf || {{ cat /tmp/iperf; return 1; }}
}}
flood() {{
    mark go
    ping -f -q -w $(seconds) $HOST >/tmp/ping
    mark stop
    awk '/ received/ {{ print $4 * 1000 / $10, $4 }}' /tmp/ping
}}
stat_again() {{ echo 3 >/proc/sys/vm/drop_caches; timed probe stat /mnt/a/small {FILES}; }}
"""
# A program, because fio sends what a command of it writes to a file.
MARK = """#!/bin/sh
[ "$NO_MARK" ] || echo "@$1" >/dev/ttyS0
"""


class Phase(NamedTuple):
    """One piece of work, started in the guest; `host` is what runs on this side meanwhile, if that is the measure."""

    name: str
    unit: str
    guest: str
    scale: float = 1.0
    host: str = ""


class Vmm(NamedTuple):
    """How to start a VMM with its guest, and what the guest is to do first."""

    start: Callable[[], Guest]
    setup: str = ":"
    facts: Mapping[str, str] = {}  # for the phases' commands


# What runs beside a table for all of it: servers on this side.
Servers = list["subprocess.Popen[bytes]"]


def _pyvmm(files: Path, *more: str) -> list[str]:
    return [
        *PYVMM, str(files / "vmlinux"), "--initrd", str(files / "initrd"), "--cmdline", CMDLINE, "--memory",
        f"{MEMORY_MIB}M", "--disk", f"{files / 'rootfs'},ro", *more,
    ]  # fmt: skip


def _qemu(files: Path, *more: str, machine: str = QEMU_MACHINE) -> list[str]:
    root = f"file={files / 'rootfs'},if=none,id=root,format=raw,readonly=on,file.locking=off"
    return common.qemu_command(
        files / "vmlinux", "-initrd", str(files / "initrd"), "-append", CMDLINE, "-serial", "stdio", "-no-reboot",
        "-global", "virtio-mmio.force-legacy=false", "-drive", root, "-device", "virtio-blk-device,drive=root", *more,
        memory=MEMORY_MIB, cpu=QEMU_CPU, machine=machine,
    )  # fmt: skip


def _firecracker(files: Path, name: str, more: Mapping[str, object], drives: Sequence[object] = ()) -> list[str]:
    root = {"drive_id": "root", "path_on_host": str(files / "rootfs"), "is_root_device": False, "is_read_only": True}
    place = SHM / f"{name}.d"
    place.mkdir(exist_ok=True)
    return common.firecracker_command(
        place, files / "vmlinux", initrd=files / "initrd", cmdline=CMDLINE, memory=MEMORY_MIB,
        more={"drives": [root, *drives], **more},
    )  # fmt: skip


def _probe(files: Path, address: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([files / "probe", "serve", address])


# -- blk


def _blk_phases() -> list[Phase]:
    phases = [
        Phase(f"blk {rw} 4k QD{depth}", "IOPS", f"blk {rw} 4k {depth}")
        for rw in ("randread", "randwrite")
        for depth in (1, 8, 32)
    ]
    phases += _mixed("blk")
    return [*phases, *(Phase(f"blk {rw} 1m", "MB/s", f"blk {rw} 1m 4", 1.048576) for rw in ("read", "write"))]


def _mixed(name: str) -> list[Phase]:
    # Seven reads to three writes.
    return [Phase(f"{name} mixed 4k QD{depth}", "IOPS", f"blk randrw 4k {depth}") for depth in (1, 8, 32)]


def _disk(path: Path) -> Path:
    # Written, not sparse: the same pages for all.
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(DISK_MIB):
            file.write(block)
    return path


def _blk(files: Path, servers: Servers) -> dict[str, Vmm]:
    return _disks_in(SHM, files)


def _queues(files: Path, servers: Servers) -> dict[str, Vmm]:
    return _disks_in(SHM, files, CPUS)


def _queues_phases() -> list[Phase]:
    return [
        Phase(f"{CPUS} queues, blk mixed 4k QD{depth}", "IOPS", f"blk_jobs randrw 4k {depth}") for depth in (1, 8, 32)
    ]


def _ext4(files: Path, servers: Servers) -> dict[str, Vmm]:
    kind = subprocess.run(["stat", "-f", "-c", "%T", files], capture_output=True, text=True, check=True).stdout.strip()
    if kind != "ext2/ext3":  # the name of all three
        raise Missing(f"disks on ext4: {files} is on {kind}; TMPDIR says where to measure")
    return _disks_in(files, files)


def _disks_in(place: Path, files: Path, queues: int = 1) -> dict[str, Vmm]:
    # With a CPU and a queue for each; Firecracker's disks have one queue.
    def pyvmm(name: str, options: str) -> Vmm:
        def start() -> Guest:
            disk = f"{_disk(place / f'{name}.disk')},queues={queues}{options}"
            return Guest(name, _pyvmm(files, "--cpus", str(queues), "--disk", disk))

        return Vmm(start)

    def fire(name: str, engine: str) -> Vmm:
        def start() -> Guest:
            disk = str(_disk(place / f"{name}.disk"))
            drive = {
                "drive_id": "d", "path_on_host": disk, "is_root_device": False, "is_read_only": False,
                "io_engine": engine, "cache_type": "Writeback",
            }  # fmt: skip
            machine = {"vcpu_count": queues, "mem_size_mib": MEMORY_MIB}
            return Guest(name, _firecracker(files, name, {"machine-config": machine}, [drive]))

        return Vmm(start)

    def qemu() -> Guest:
        drive = f"file={_disk(place / 'qemu.disk')},if=none,id=d,format=raw,aio=io_uring,cache=writeback"
        device = f"virtio-blk-device,drive=d,iothread=io,num-queues={queues}"
        more = ("-smp", str(queues), "-object", "iothread,id=io", "-drive", drive, "-device", device)
        return Guest("qemu", _qemu(files, *more))

    # pyvmm's engines, by the name of a program each, as the environment may choose others to compare.
    engines = json.loads(os.environ.get("PYVMM_BENCH_BLK", '{"pyvmm": ""}'))
    return {name: pyvmm(name, options) for name, options in engines.items()} | {
        "qemu": Vmm(qemu),
        "firecracker_sync": fire("firecracker_sync", "Sync"),
        "firecracker_async": fire("firecracker_async", "Async"),
    }


# -- net


def _net_phases() -> list[Phase]:
    return [
        Phase("net TCP guest to host", "MB/s", "timed probe send tcp:$HOST:7000 $RUNTIME 131072", 1e-6),
        Phase("net TCP host to guest", "MB/s", "timed probe recv tcp:$HOST:7000 $RUNTIME 131072", 1e-6),
        Phase("net TCP round trip", "1/s", "timed probe ping tcp:$HOST:7000 $RUNTIME"),
        Phase("net UDP 64 B guest to host", "packets/s", "timed probe udp udp:$HOST:7000 $RUNTIME 64"),
        Phase("net UDP 64 B host to guest", "packets/s", "", host="udp udp:{guest}:7000 {seconds} 64"),
        *_users("net"),
        Phase("net ping", "1/s", "flood"),
    ]


def _users(name: str) -> list[Phase]:
    # What users measure: iperf3 and HTTP.
    ways = (("guest to host", ""), ("host to guest", " -R"))
    streams = [
        Phase(f"{name} iperf3 {way}, streams {count}", "MB/s", f"iperf {count}{option}", 1e-6)
        for way, option in ways
        for count in (1, 4)
    ]
    return [*streams, Phase(f"{name} HTTP requests", "1/s", "timed probe http tcp:$HOST:7080 $RUNTIME")]


def _net_queues_phases() -> list[Phase]:
    return [
        *_users(f"{CPUS} pairs, net"),
        Phase(f"{CPUS} pairs, net TCP round trip", "1/s", "timed probe ping tcp:$HOST:7000 $RUNTIME"),
    ]


def _tap(name: str, address: str, pairs: int) -> str:
    several = ["multi_queue"] if pairs > 1 else []
    subprocess.run(["ip", "link", "del", name], stderr=subprocess.DEVNULL, check=False)
    subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap", *several], check=True)
    subprocess.run(["ip", "addr", "add", f"{address}/24", "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    return name


def _net(files: Path, servers: Servers, pairs: int = 1) -> dict[str, Vmm]:
    # With a CPU for each pair of queues; Firecracker has one pair.
    def pyvmm(tap: str, mac: str) -> list[str]:
        return _pyvmm(files, "--cpus", str(pairs), "--net", f"tap={tap},mac={mac},queues={pairs}")

    def qemu(tap: str, mac: str) -> list[str]:
        netdev = f"tap,id=n,ifname={tap},script=no,downscript=no,vhost=off,queues={pairs}"
        device = f"virtio-net-device,netdev=n,mac={mac},mq={'on' if pairs > 1 else 'off'}"
        return _qemu(files, "-smp", str(pairs), "-netdev", netdev, "-device", device)

    def fire(tap: str, mac: str) -> list[str]:
        interface = {"iface_id": "eth0", "host_dev_name": tap, "guest_mac": mac}
        machine = {"vcpu_count": pairs, "mem_size_mib": MEMORY_MIB}
        return _firecracker(files, "firecracker", {"machine-config": machine, "network-interfaces": [interface]})

    found = {}
    for number, (name, command) in enumerate((("pyvmm", pyvmm), ("qemu", qemu), ("firecracker", fire)), start=1):
        host, guest = f"10.77.{number}.1", f"10.77.{number}.2"

        def start(
            name: str = name, command: Callable[[str, str], list[str]] = command, host: str = host, number: int = number
        ) -> Guest:
            return Guest(
                name,
                command(
                    _tap(f"bench{number}", host, 1 if name == "firecracker" else pairs), f"06:00:00:00:00:0{number}"
                ),
            )

        setup = (
            f"HOST={host}; ip addr add {guest}/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 5 {host} >/dev/null"
            " && { probe serve udp:0.0.0.0:7000 & }"
        )
        found[name] = Vmm(start, setup, {"guest": guest})
    servers += [_probe(files, "tcp:0.0.0.0:7000"), _probe(files, "udp:0.0.0.0:7000"), *_of_users(files)]
    return found


def _of_users(files: Path) -> Servers:
    place = SHM / "http"  # nginx gives the directory of its temporary files to its user
    place.mkdir(exist_ok=True)
    (place / "index.html").write_text("small\n")
    temporary = " ".join(f"{kind}_temp_path {place};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (place / "nginx.conf").write_text(f"""
        daemon off; master_process off; pid {place}/pid;
        events {{}}
        http {{ access_log off; {temporary} server {{ listen 7080 backlog=1024; root {place}; }} }}
    """)
    nginx = subprocess.Popen([files / "nginx", "-c", place / "nginx.conf", "-e", place / "log"])
    return [nginx, subprocess.Popen([files / "iperf3", "-s"], stdout=subprocess.DEVNULL)]


def _passt(files: Path, servers: Servers) -> dict[str, Vmm]:
    # An address of this host's own that its guests do not have.
    host = "10.77.9.1"
    subprocess.run(["ip", "addr", "replace", f"{host}/32", "dev", "lo"], check=True)
    servers += _of_users(files)

    def qemu() -> Guest:
        path = SHM / "passt"
        command = ["passt", "--foreground", "--quiet", "--no-map-gw", "--runas", "0", "--socket", str(path)]
        daemon = subprocess.Popen(command, start_new_session=True)
        _wait_for(path, daemon, lambda: "passt: no socket")
        netdev = f"stream,id=n,server=off,addr.type=unix,addr.path={path}"
        return Guest("qemu", _qemu(files, "-netdev", netdev, "-device", "virtio-net-device,netdev=n"), [daemon])

    setup = (
        f"HOST={host}; ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip route add default via 10.0.2.2"
    )
    return {
        "pyvmm": Vmm(lambda: Guest("pyvmm", _pyvmm(files, "--net", "user")), setup),
        "qemu": Vmm(qemu, setup),
    }


def _wait_for(path: Path, process: subprocess.Popen[bytes], why: Callable[[], str]) -> None:
    """Wait for a socket of a program.

    :raises Missing: the program ended, or there is no socket after 20 s
    """
    end = time.monotonic() + 20
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise Missing(why())
        time.sleep(0.05)


# -- vsock


def _vsock_phases() -> list[Phase]:
    return [
        Phase("vsock guest to host", "MB/s", "timed probe send vsock:2:7000 $RUNTIME 65536", 1e-6),
        Phase("vsock host to guest", "MB/s", "timed probe recv vsock:2:7000 $RUNTIME 65536", 1e-6),
        Phase("vsock round trip", "1/s", "timed probe ping vsock:2:7000 $RUNTIME"),
        Phase("vsock connections by the guest", "1/s", "timed probe connect vsock:2:7000 $RUNTIME"),
        Phase("vsock connections by the host", "1/s", "", host="connect {guest} {seconds}"),
    ]


def vsock_guests(files: Path, servers: Servers) -> dict[str, Vmm]:
    """VMMs with a socket device, and in `servers` what runs on this side."""
    # 4294967295 is VMADDR_CID_ANY
    setup = "{ probe serve vsock:4294967295:7000 & }; sleep 1"
    found = {}
    for name in ("pyvmm", "firecracker"):
        path = SHM / f"{name}.vsock"

        def start(name: str = name, path: Path = path) -> Guest:
            path.unlink(missing_ok=True)
            if name == "pyvmm":
                return Guest(name, _pyvmm(files, "--vsock", f"cid=3,uds={path}"))
            return Guest(name, _firecracker(files, name, {"vsock": {"guest_cid": 3, "uds_path": str(path)}}))

        servers.append(_probe(files, f"unix:{path}_7000"))
        found[name] = Vmm(start, setup, {"guest": f"hybrid:{path}:7000"})
    if not os.path.exists(VHOST_VSOCK):
        print(f"vsock: without QEMU, whose vsock is the host kernel's: no {VHOST_VSOCK}", file=sys.stderr)
        return found
    servers.append(_probe(files, "vsock:4294967295:7000"))
    device = "vhost-vsock-device,guest-cid=42"
    found["qemu"] = Vmm(lambda: Guest("qemu", _qemu(files, "-device", device)), setup, {"guest": "vsock:42:7000"})
    return found


# -- fs


def _fs_phases() -> list[Phase]:
    mib = 1.048576
    return [
        Phase("fs write 1m", "MB/s", "fs write 1m", mib),
        Phase("fs read 1m", "MB/s", "fs read 1m", mib),
        Phase("fs randread 4k", "IOPS", "fs randread 4k"),
        Phase("fs randwrite 4k", "IOPS", "fs randwrite 4k"),
        Phase("fs buffered read 1m", "MB/s", "echo 3 >/proc/sys/vm/drop_caches; fs read 1m 0", mib),
        Phase("fs files created", "1/s", "create"),
        Phase("fs stat", "1/s", "stat_again"),
        Phase("fs files unpacked", "1/s", "unpack"),
        Phase("fs files cloned by git", "1/s", "clone"),
        Phase("fs files found", "1/s", "find_again"),
        Phase("fs files compiled", "1/s", "compile"),
        Phase("fs small files again", "1/s", "open_again"),
    ]


def _fs(files: Path, servers: Servers) -> dict[str, Vmm]:
    def share(name: str) -> Path:
        path = SHM / f"{name}.share"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        with (path / "big").open("wb") as file:
            for _ in range(FILE_MIB):
                file.write(os.urandom(1 << 20))
        return path

    def pyvmm(name: str, cache: str) -> Guest:
        return Guest(name, _pyvmm(files, "--share", f"share={share(name)},cache={cache}"))

    def qemu() -> Guest:
        path, listens = share("qemu"), SHM / "virtiofsd"
        if not os.access(VIRTIOFSD, os.X_OK):
            raise Missing(f"{VIRTIOFSD}: apt-get install qemu-system-common")
        listens.unlink(missing_ok=True)
        log = (files / "virtiofsd.log").open("wb")
        sandbox = ("-o", "sandbox=chroot") if native.here() else ()  # a container may forbid it namespaces
        daemon = subprocess.Popen(
            [VIRTIOFSD, f"--socket-path={listens}", "-o", f"source={path}", "-o", "cache=auto", *sandbox],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        _wait_for(listens, daemon, lambda: f"virtiofsd: {(files / 'virtiofsd.log').read_text()[-500:]}")
        command = _qemu(
            files, "-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on", "-chardev",
            f"socket,id=fs,path={listens}", "-device", "vhost-user-fs-device,chardev=fs,tag=share",
            machine=f"{QEMU_MACHINE},memory-backend=ram",
        )  # fmt: skip
        return Guest("qemu", command, [daemon])

    setup = (
        "mount -t virtiofs {options} share /mnt/a && tar -cf /tmp/headers.tar -C /usr/include linux && "
        "git init -q /tmp/repo && cp -r /usr/include/linux /tmp/repo && git -C /tmp/repo add linux && "
        "git -C /tmp/repo -c user.name=a -c user.email=a@b commit -q -m all"
    )
    return {
        "pyvmm": Vmm(lambda: pyvmm("pyvmm", "auto"), setup.format(options="")),
        "pyvmm_always": Vmm(lambda: pyvmm("pyvmm_always", "always"), setup.format(options="")),
        "pyvmm_dax": Vmm(lambda: pyvmm("pyvmm_dax", f"auto,dax={DAX_MIB}M"), setup.format(options="-o dax=always")),
        "qemu": Vmm(qemu, setup.format(options="")),
    }


TABLES: dict[str, tuple[Callable[[], list[Phase]], Callable[[Path, Servers], dict[str, Vmm]]]] = {
    "blk": (_blk_phases, _blk),
    "ext4": (lambda: _mixed("ext4"), _ext4),
    "queues": (_queues_phases, _queues),
    "net": (_net_phases, _net),
    "netqueues": (_net_queues_phases, lambda files, servers: _net(files, servers, CPUS)),
    "passt": (lambda: _users("passt"), _passt),
    "vsock": (_vsock_phases, vsock_guests),
    "fs": (_fs_phases, _fs),
}


def _measure(files: Path, guest: Guest, vmm: Vmm, phase: Phase, *, warm: bool) -> dict[str, float]:
    if phase.host:
        command = [str(files / "probe"), *phase.host.format(seconds=f"{RUNTIME:g}", **vmm.facts).split()]
        cpu, start = guest.cpu(), time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        said, failed = done.stdout, done.stderr if done.returncode else ""
        cpu, wall = guest.cpu() - cpu, time.monotonic() - start
    else:
        if warm:
            guest.ask(f"warm '{phase.guest}'", PATIENCE)
        guest.tell(phase.guest)
        guest.until(b"@go", PATIENCE)
        cpu, start = guest.cpu(), time.monotonic()
        guest.until(b"@stop", PATIENCE)
        cpu, wall = guest.cpu() - cpu, time.monotonic() - start
        status, said = guest.answer(PATIENCE)
        failed = said if status else ""
    if failed:
        raise GuestFailed(f"{guest.name}: {phase.name}: {failed}")
    rate, count = (float(word) * phase.scale for word in said.split())
    return {"rate": rate, "cpu": cpu / count if count else 0.0, "busy": cpu / wall}


def main(name: str, table: str, *wanted: str) -> int:
    """Measure a table, or the phases of it that are `wanted`."""
    files = Path(name)
    make_phases, make_vmms = TABLES[table]
    only = os.environ.get("PYVMM_BENCH_ONLY", "").split()
    shutil.rmtree(SHM, ignore_errors=True)
    SHM.mkdir()
    for program in (PYVMM[0], common.QEMU, firecracker()):
        subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, check=False)
    guests: dict[str, Guest] = {}
    servers: Servers = []
    with (files / "runs").open("a") as runs:

        def note(**facts: object) -> None:
            print(f"{table}: {facts}", file=sys.stderr, flush=True)
            runs.write(json.dumps(facts) + "\n")
            runs.flush()

        def failed(program: str, what: str, problem: Exception) -> None:
            note(program=program, phase=what, missing=str(problem))
            if program in guests:
                guests.pop(program).close()

        try:
            vmms = make_vmms(files, servers)
            for program, vmm in vmms.items():
                if only and program not in only:
                    continue
                start = time.monotonic()
                try:
                    guest = guests[program] = vmm.start()
                    guest.wait_ready(PATIENCE)
                    guest.ask(vmm.setup)
                    print(f"{program}: up after {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
                except (GuestFailed, Missing) as problem:
                    failed(program, "start", problem)
            for phase in make_phases():
                if wanted and phase.name not in wanted:
                    continue
                for repeat in range(REPEATS):
                    # Each is the first at some time.
                    order = list(guests)
                    for program in order[repeat % max(1, len(order)) :] + order[: repeat % max(1, len(order))]:
                        try:
                            facts = _measure(files, guests[program], vmms[program], phase, warm=repeat == 0)
                            note(program=program, phase=phase.name, repeat=repeat, **facts)
                        except (GuestFailed, subprocess.TimeoutExpired) as problem:
                            failed(program, phase.name, problem)
        finally:
            for guest in guests.values():
                guest.close()
            for server in servers:
                server.kill()
                server.wait()
            shutil.rmtree(SHM, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
