# SPDX-License-Identifier: Apache-2.0
"""What pyvmm puts into a guest: /init of the initramfs, process 1 of the root file system, poweroff, exit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vmm.images.container import ImageConfig
from vmm.images.host import PullError
from vmm.images.initramfs import LOAD_MODULES

# What a stock Debian kernel has as modules and needs for a root on virtio.
MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "ext4")
# crc32c is for ext4; since Linux 6.16 it is a library of the kernel's.
OPTIONAL_MODULES = ("pvpanic-mmio", "crc32c_generic", "crc32c-intel")
# Loaded where there is such a device, or when such a file system is mounted.
ON_DEMAND_MODULES = (
    "virtio_net", "virtio_rng", "virtio_balloon", "virtio_console", "virtiofs", "vmw_vsock_virtio_transport", "overlay",
)  # fmt: skip

# /init of the initramfs. It understands root=, rootfstype=, rootflags=, ro, rw and init= as the kernel does;
# it hands on its own arguments (what the kernel's command line has after --) to the root file system's init.
INIT = (
    LOAD_MODULES
    + r"""
# the drivers of the other virtio devices that are here
for file in /sys/bus/virtio/devices/*/modalias; do
    [ -e "$file" ] && read -r alias <"$file" && modprobe -q "$alias" 2>/dev/null
done

root='' type='' flags='' mode=ro init=/sbin/init panic='' overlay=''
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
    --) break ;;
    root=*) root=${word#*=} ;;
    rootfstype=*) type=${word#*=} ;;
    rootflags=*) flags=,${word#*=} ;;
    ro | rw) mode=$word ;;
    init=*) init=${word#*=} ;;
    overlay=*) overlay=${word#*=} ;;
    panic=*) panic=yes ;;
    esac
done

case " $cmdline " in *" -- -s "*) stty -echo ;; esac

# without a root this is the system: its session is the one of the images
[ "$root" ] || exec /usr/lib/pyvmm/init "$@"

# as the kernel does, panic= decides whether a machine that cannot go on ends or waits for a person
fail() {
    echo "init: $1"
    stty echo # waits until that is out
    [ "$panic" ] && exit 1
    exec /usr/lib/pyvmm/init
}

# of a partition, as the kernel has it: GPT's GUID, or MBR's disk signature and the partition's number
partuuid() {
    read -r number <"/sys/class/block/$1/partition"
    disk=$(readlink -f "/sys/class/block/$1/..")
    read -r sector <"$disk/queue/logical_block_size"
    bytes() { hexdump -v -s "$1" -n "$2" -e "$3" "/dev/${disk##*/}"; }
    if [ "$(bytes "$sector" 8 '8/1 "%02x"')" = 4546492050415254 ]; then
        table=$(bytes $((sector + 72)) 4 '1/4 "%u"') size=$(bytes $((sector + 84)) 4 '1/4 "%u"')
        bytes $((table * sector + (number - 1) * size + 16)) 16 '1/4 "%08x-" 2/2 "%04x-" 2/1 "%02x" "-" 6/1 "%02x"'
    else
        bytes 440 4 '1/4 "%08x-"'
        printf %02x "$number"
    fi
}

# the device of root=PARTUUID=..., to which /PARTNROFF=N may be added: the partition of a number higher by N
of_partuuid() {
    wanted=$(echo "${root#*=}" | tr A-Z a-z) offset=0
    case $wanted in */partnroff=*) offset=${wanted##*=} wanted=${wanted%%/*} ;; esac
    for part in /sys/class/block/*/partition; do
        part=${part%/partition}
        [ -e "$part" ] && [ "$(partuuid "${part##*/}")" = "$wanted" ] || continue
        read -r number <"$part/partition"
        for other in "$part"/../*/partition; do
            [ "$(cat "$other")" = $((number + offset)) ] && other=${other%/*} && echo "/dev/${other##*/}" && return
        done
    done
    false
}

# the device whose line in sysfs is this one
of_uevent() { grep -lxF "$1" /sys/class/block/*/uevent 2>/dev/null | sed -n '1s|.*/\(.*\)/uevent|/dev/\1|p' | grep .; }

# a device may take a moment to appear, and what names it otherwise than by its path is found only when it has
found() {
    case $root in
    LABEL=* | UUID=*) device=$(findfs "$root" 2>/dev/null) ;;
    PARTUUID=*) device=$(of_partuuid) ;;
    PARTLABEL=*) device=$(of_uevent "PARTNAME=${root#*=}") ;;
    /dev/*) device=$root && [ -b "$root" ] ;;
    *) device=$root ;; # a virtiofs tag
    esac
}
tries=0
until found; do
    tries=$((tries + 1))
    [ $tries -le 100 ] && sleep 0.1 && continue
    disks=$(ls /sys/class/block)
    fail "root=$root is not there after 10 s; there is: $(echo ${disks:-no disk})"
done
place=/mnt
[ "$overlay" ] && place=/lower && mkdir -p /lower /upper
mount ${type:+-t "$type"} -o "$mode$flags" "$device" $place || fail "cannot mount root=$root"
if [ "$overlay" ]; then
    # what is written goes to a disk of its own, or to memory
    case $overlay in
    /dev/*) mount -o rw "$overlay" /upper || fail "cannot mount overlay=$overlay" ;;
    *) mount -t tmpfs -o mode=755 upper /upper ;;
    esac
    mkdir -p /upper/upper /upper/work
    mount -t overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work overlay /mnt ||
        fail "cannot mount the overlay over root=$root"
fi
# a container image has no init of its own
[ -e /etc/pyvmm/enter ] && exec /usr/lib/pyvmm/init "$@"
[ -x "/mnt$init" ] || [ -L "/mnt$init" ] || fail "$root has no $init"
for dir in proc sys dev; do mount --move /$dir /mnt/$dir; done
exec switch_root /mnt "$init" "$@"
"""
)

# /usr/lib/pyvmm/init of a root file system, and its /sbin/init unless a package brought another.
ROOT_INIT = r"""#!/bin/sh
# Process 1 of a pyvmm image: one session on the console; when it ends the machine powers off, and pyvmm exits
# with the session's status. The kernel's command line says which, after --:
#   (nothing)       a login shell
#   -s              a shell that reads commands from the console, without prompt and echo
#   COMMAND ARG...  that command
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root USER=root LOGNAME=root SHELL=/bin/bash
[ -x $SHELL ] || SHELL=/bin/sh

[ -e /proc/mounts ] || mount -t proc proc /proc
[ -e /sys/class ] || mount -t sysfs sysfs /sys
[ -e /dev/kmsg ] || mount -t devtmpfs dev /dev
read -r cmdline </proc/cmdline
case " $cmdline " in
*" ro "*) ;;
*) grep -q '^[^ ]* / [^ ]* ro' /proc/mounts && mount -o remount,rw / ;;
esac
mkdir -p /dev/pts /dev/shm
mount -a
read -r name </etc/hostname && echo "$name" >/proc/sys/kernel/hostname
ip link set lo up

# the kernel hands over words that it does not know, too: only those after -- are ours
case " $cmdline " in
*" -- "*)
    first=${cmdline#*-- }
    first=${first#\"}
    first=${first%%[ \"]*}
    while [ $# -gt 0 ] && [ "${1#"$first"}" = "$1" ]; do shift; done
    ;;
*) set -- ;;
esac

read -r consoles </sys/class/tty/console/active
console=/dev/${consoles##* }
[ -c "$console" ] || console=/dev/null
exec 3<>$console # held open: what is typed early is lost when the last one closes it
[ "$LINES" ] && [ "$COLUMNS" ] && stty rows "$LINES" columns "$COLUMNS" <$console
unset LINES COLUMNS
cd /root
if [ -e /etc/pyvmm/enter ]; then
    # the program of the container image at /mnt: its entrypoint, with the words here in place of its own arguments
    for dir in proc sys dev; do mkdir -p /mnt/$dir && mount --rbind /$dir /mnt/$dir; done
    ln -sf /proc/self/fd /dev/fd
    ln -sf fd/0 /dev/stdin && ln -sf fd/1 /dev/stdout && ln -sf fd/2 /dev/stderr
    mkdir -p /mnt/etc
    [ -s /mnt/etc/hosts ] || cp /etc/hosts /mnt/etc/hosts
    cat /etc/pyvmm/enter >/run/enter
    if [ $# -gt 0 ]; then printf '%s\0' "$@"; else cat /etc/pyvmm/cmd; fi >>/run/enter
    set -- /usr/lib/pyvmm/enter
elif [ $# -eq 0 ]; then
    set -- $SHELL -l
elif [ "$1" = -s ]; then
    stty -echo -onlcr <$console
    printf '\021' >$console # DC1, "start the tape reader": whoever waits for it sees no byte echoed or lost
    set -- sh "$console" # as a file, so that the shell is not interactive
fi
# What waits in a terminal is thrown away when its session's leader ends, so the leader is a shell that waits for it.
# Ctrl-C and Ctrl-\ are the program's, not its; nor does it stop where a killed program leaves the terminal to others.
setsid -c sh -c 'trap : INT QUIT; "$@"; status=$?; trap "" TTOU; stty echo 2>/dev/null; exit $status' sh "$@" \
    <$console >$console 2>&1 3>&-
status=$?

action=poweroff
[ -s /run/init.action ] && status=0 && read -r action </run/init.action
kill -TERM -1 && sleep 0.1 && kill -KILL -1
sync
mount -o remount,ro / 2>/dev/null
# a status to tell, or no ACPI to power off with
if [ $status -ne 0 ] || { [ ! -d /sys/firmware/acpi ] && [ $action != reboot ]; }; then
    /usr/lib/pyvmm/exit $status
fi
exec busybox "$action" -f
"""

# /sbin/poweroff, reboot and halt: end the session, so that init does the rest.
POWEROFF = r"""#!/bin/sh
action=${0##*/}
case $1 in -f | --force) exec busybox "$action" -f ;; esac
trap '' HUP TERM
echo "$action" >/run/init.action
kill -HUP -1
sleep 0.2
kill -KILL -1
"""

# busybox's shell prefers its own applets to programs, and its poweroff signals a busybox init.
BUSYBOX_PROFILE = r"""PS1='\u@\h:\w\$ '
poweroff() { /sbin/poweroff "$@"; }
reboot() { /sbin/reboot "$@"; }
halt() { /sbin/halt "$@"; }
"""

FSTAB = """\
devpts /dev/pts devpts gid=5,mode=620,ptmxmode=666 0 0
tmpfs /dev/shm tmpfs nosuid,nodev 0 0
tmpfs /run tmpfs nosuid,nodev,mode=755 0 0
cgroup2 /sys/fs/cgroup cgroup2 nosuid,nodev,noexec 0 0
"""

# For an image with systemd (--packages systemd-sysv,udev): root is logged in on the serial console here, too.
AUTOLOGIN = """\
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud %I 115200,38400,9600 $TERM
"""


def _program(name: str) -> bytes:
    path = Path(__file__).with_name(f"{name}.elf")
    if not path.is_file():
        raise PullError(f"{path} is missing: install pyvmm again, or run `make install`")
    return path.read_bytes()


def session_files(hostname: str) -> dict[str, str | bytes]:
    """Return the files of process 1 and what it reads, by path in the guest.

    :raises PullError: pyvmm was not built whole
    """
    return {
        "usr/lib/pyvmm/init": ROOT_INIT,
        "usr/lib/pyvmm/poweroff": POWEROFF,
        "usr/lib/pyvmm/exit": _program("exit"),
        "etc/fstab": FSTAB,
        "etc/hostname": f"{hostname}\n",
        "etc/hosts": f"127.0.0.1 localhost {hostname}\n::1 localhost\n",
    }


def busybox_files(hostname: str) -> dict[str, str | bytes]:
    """Return ``session_files`` and what busybox needs beside them."""
    return session_files(hostname) | {
        "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
        "etc/profile": BUSYBOX_PROFILE,
        "sbin/poweroff": POWEROFF,
        "sbin/reboot": POWEROFF,
        "sbin/halt": POWEROFF,
    }


def container_files(config: ImageConfig) -> dict[str, str | bytes]:
    """Return the initramfs's files for a container image; what starts its program is ``enter.c``."""
    env = {"HOME": config.home, "TERM": "linux"} | config.env
    env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    groups = ",".join(map(str, (config.gid, *config.groups)))
    head = [str(config.uid), str(config.gid), groups, config.working_dir, str(len(env))]
    words = [*head, *(f"{name}={value}" for name, value in env.items()), *config.entrypoint]
    return busybox_files("container") | {
        "usr/lib/pyvmm/enter": _program("enter"),
        "etc/pyvmm/enter": _words(words),
        "etc/pyvmm/cmd": _words(config.cmd or (() if config.entrypoint else ("/bin/sh",))),
    }


def _words(words: Iterable[str]) -> bytes:
    return b"".join(word.encode(errors="surrogateescape") + b"\0" for word in words)
