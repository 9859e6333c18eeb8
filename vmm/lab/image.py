# SPDX-License-Identifier: Apache-2.0
"""The lab's kernel and initramfs: Debian's kernel, busybox, an init that runs the command in this host's root."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from vmm.durable import write_all, write_whole
from vmm.images import apt, cache_root, initramfs
from vmm.images.host import Progress, run, silent

KERNEL_PACKAGE = "linux-image-amd64"
MODULES = (
    "virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_console", "kvm_amd", "virtio_net", "virtio_blk",
    "tun",
)  # fmt: skip
OPTIONAL_MODULES = ("vhost_net", "vhost_vsock", "loop")

# The job directory, a 9p export of its own, says what to run: `run` (a script), `writable` (lines of tag and
# path), `modules` (the kernel's version, and where this host has its modules) and, where there is a terminal,
# `terminal` (rows and columns). Ports are virtio-console's, found by name. On `control` init says "up" and
# "exit STATUS", and the host says names of signals for the command.
INIT = (
    initramfs.LOAD_MODULES
    + r"""
share() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=1048576,$3" "$1" "$2"; }
port() {
    for p in /sys/class/virtio-ports/*; do [ "$(cat "$p/name")" = "$1" ] && echo "/dev/${p##*/}" && return; done
}
# All but CPU 0, which must run no guest (SPARE_CPUS).
read -r online </sys/devices/system/cpu/online
taskset -pc "1-${online#0-}" $$ >/dev/null
mkdir -p /job /host /rw /new
share job /job cache=none
share host /host cache=loose,ro
mount -t tmpfs -o size=75% rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /new
mount -t proc proc /new/proc
mount -t sysfs sysfs /new/sys
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
mount --bind /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
for name in fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
    link=${name%:*} target=${name#*:}
    ln -s "/proc/self/$target" "/dev/$link"
done
mount -t devpts -o mode=620,ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t tmpfs run /new/run
while IFS= read -r line; do
    path=${line#* }
    mkdir -p "/new$path"
    share "${line%% *}" "/new$path" cache=mmap || exit
done </job/writable
read -r version modules </job/modules
mkdir -p "/new/lib/modules/$version"
mount --bind "/new$modules" "/new/lib/modules/$version"
# What the kernel loads by itself it finds there, too, by the host's modprobe.
if [ -L /new/sbin/modprobe ] || [ -x /new/sbin/modprobe ]; then
    printf '#!/bin/sh\nexec chroot /new /sbin/modprobe "$@"\n' >/modprobe
    chmod +x /modprobe
    echo /modprobe >/proc/sys/kernel/modprobe
fi
hostname pyvmm-lab
ip link set lo up
chmod 666 /dev/kvm /dev/vhost-net /dev/vhost-vsock /dev/net/tun 2>/dev/null
mkfifo /out /err
# Input comes in frames, a length on a line and then its bytes; 0 is the end. A port that the host closes would
# lose what QEMU has not passed on yet.
feed() {
    while read -r n <&4 && [ "$n" != 0 ]; do dd bs="$n" count=1 iflag=fullblock <&4 2>/dev/null || return; done
}
exec 4<"$(port in)"
cat /out >"$(port out)" & out=$!
cat /err >"$(port err)" & err=$!
exec 3<>"$(port control)"
echo up >&3
cp /job/run /new/run/pyvmm-lab
pid() { cat /new/run/pyvmm-lab.pid 2>/dev/null || { sleep 1; cat /new/run/pyvmm-lab.pid; }; }
(while read -r name <&3; do kill "-$name" "-$(pid)"; done) &
# In the foreground: a shell's background command would start with SIGINT ignored, and Ctrl-C pass it by. In a
# subshell: the shell itself would write of the command's death into the command's errors.
if [ -e /job/terminal ]; then
    read -r rows columns </job/terminal
    command="stty rows $rows cols $columns; exec /bin/sh /run/pyvmm-lab"
    (exec setsid chroot /new /usr/bin/script -qec "$command" /dev/null) <&4 >/out 2>/err
else
    # A pipe without a name: to open one that has a name, as /dev/stdin, would wait for a writer after the end.
    { feed & } | (exec setsid chroot /new /bin/sh /run/pyvmm-lab) >/out 2>/err
fi
status=$?
# The pumps end with the last holder of their pipes; a daemon that the command left must not hold us up.
(sleep 5; kill $out $err) 2>/dev/null &
wait $out $err
sync
echo "exit $status" >&3
reboot -f
"""
)


class LabImage(NamedTuple):
    """Paths of the two files that QEMU boots; the kernel's version, and the directory of its modules."""

    kernel: str
    initramfs: str
    version: str
    modules: str


def image_key(version: str) -> str:
    """What the image is made of, as one word: the kernel package's version, its modules, our init."""
    parts = (version, MODULES, OPTIONAL_MODULES, INIT)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def lab_image(progress: Progress = silent) -> LabImage:
    """The lab's image, made the first time and kept under the cache directory.

    :raises PullError: the kernel or busybox cannot be fetched
    """
    package = apt.package(KERNEL_PACKAGE, progress=progress)
    kernel, version = apt.kernel_of(package.tree)
    modules = apt.modules_root(package.tree)
    if not (modules / version / "modules.dep").exists():  # installing the package would have made it
        run(["depmod", "-b", str(modules.parents[1]), version])
    path = Path(cache_root(), "lab", f"{version}-{image_key(package.version)}.cpio")
    if not path.exists():
        data = initramfs.build_initramfs(package.tree, MODULES, INIT, optional=OPTIONAL_MODULES, progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole((str(path), lambda fd: write_all(fd, data)))
        for old in path.parent.glob("*.cpio"):
            if old != path:
                old.unlink(missing_ok=True)  # another lab may be at it, too
    return LabImage(str(kernel), str(path), version, str(modules / version))
