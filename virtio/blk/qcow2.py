# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image as a raw file: ``qemu-storage-daemon`` of Debian's qemu-system-common shows it by FUSE.

A qcow2 header can name other files of the host: one that is read (the backing file) and one that is read and
written (the external data file). The maker of the image chose them. So pyvmm reads the header before QEMU does, and as
root QEMU sees only the files that the user named.

Source: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import time

from vmm.closing import Closing
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROGRAM = "qemu-storage-daemon"
MAGIC = b"QFI\xfb"
_PATIENCE = 10.0
_V2 = struct.Struct(">4sIQIIQI")  # magic, version, backing offset and length, cluster_bits, size, crypt_method
_V3_AT = struct.Struct(">Q20xI")  # from byte 72: incompatible_features, header_length
_EXTENSION = struct.Struct(">II")  # type, length
_EXTENSIONS_MAX = 1 << 16  # bytes that are looked through; QEMU writes a few hundred
_EXTERNAL_DATA = 1 << 2
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
# Where the programs and libraries of a distribution are; in QEMU's view read-only.
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
# As root: a view of the host without anything but QEMU itself and the image, and no rights but those of the image's
# owner, and to mount. $1: a directory for it; $2, $3: the owner; $4: name of a file; then pairs of ro or rw and a file,
# which becomes file0, file1, ..; then -- and the program. /proc/PID/root leads there.
_WALLS = r"""
root=$1 uid=$2 gid=$3 pid=$4; shift 4
mount -t tmpfs -o size=1m,mode=0755 none "$root"
mkdir "$root/dev" "$root/etc"
for each in $SYSTEM; do
    if [ -d "$each" ]; then mkdir "$root$each"; elif [ -e "$each" ]; then : >"$root$each"; else continue; fi
    mount --bind "$each" "$root$each"
    mount -o remount,bind,ro "$root$each"
done
mknod -m 0666 "$root/dev/fuse" c 10 229
mknod -m 0666 "$root/dev/null" c 1 3
count=0
while [ "$1" != -- ]; do
    : >"$root/file$count"
    mount --bind -- "$2" "$root/file$count"
    [ "$1" = rw ] || mount -o remount,bind,ro "$root/file$count"
    count=$((count + 1)); shift 2
done
shift
: >"$root/raw"; : >"$root/$pid"
chown "$uid:$gid" "$root" "$root/raw" "$root/$pid"
cd "$root"
exec chroot . setpriv --reuid "$uid" --regid "$gid" --clear-groups \
    --inh-caps=-all,+sys_admin --ambient-caps=-all,+sys_admin --bounding-set=-all,+sys_admin -- "$@"
"""
_GUARD = r"""
read _; kill "$1"; while [ -e "/proc/$1/exe" ]; do sleep 0.1; done  # of a zombie, which kill finds, nothing is there
rm -f "$2/raw" "$2/${2##*/}"; rmdir "$2"
"""


class Qcow2(Closing):
    """An image and the process that shows it, until ``close``. It needs /dev/fuse, and root or ``fusermount3``.

    :param path: the image
    :param read_only: never write to the image
    :param backing_file: the file that the image is a change of, which is read; what the image names is not opened
    :param backing_format: format of the backing file: ``raw`` or ``qcow2``
    :raises ConfigError: the image names a file that was not named here, the program is not there, or cannot do it

    ``raw`` is the path of the file that has the image's contents and takes writes, flushes and holes. A hole is of
    whole clusters of ``cluster`` bytes: QEMU 11 refuses another. QEMU locks the image. Should this process be killed,
    the other one ends too, and writes what it has before.
    """

    def __init__(
        self, path: str, *, read_only: bool = False, backing_file: str | None = None, backing_format: str = "raw"
    ) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConfigError("disk", path, f"is qcow2, which needs {PROGRAM}: apt install qemu-system-common")
        self._daemon: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._files = [(os.path.abspath(path), read_only)]
        self.cluster = _cluster(path, backing_file, backing_format)
        if backing_file is not None:
            self._files.append((os.path.abspath(backing_file), True))
            if backing_format == "qcow2":
                _cluster(backing_file, None, "")
        self._directory = tempfile.mkdtemp(prefix="pyvmm-qcow2-")
        self.raw = os.path.join(self._directory, "raw")
        try:
            self._start(program, path, read_only, backing_format)
        except BaseException:
            self.close()
            raise

    def _start(self, program: str, path: str, read_only: bool, backing_format: str) -> None:
        walled = os.geteuid() == 0
        base = "" if walled else self._directory
        ready = os.path.basename(self._directory)  # a name that the host's own root directory does not have
        names = [f"/file{number}" if walled else name for number, (name, _) in enumerate(self._files)]
        node = _node("qcow2", self._files[0][0], names[0], read_only)
        if len(names) > 1:
            node["backing"] = _node(backing_format, self._files[1][0], names[1], True)
        node |= {"node-name": "disk", "discard": "unmap"}
        export = {"type": "fuse", "id": "export", "node-name": "disk", "mountpoint": f"{base}/raw"}
        export["writable"] = not read_only  # type: ignore[assignment]
        command = [
            program, "--blockdev", json.dumps(node), "--export", json.dumps(export), "--pidfile", f"{base}/{ready}",
        ]  # fmt: skip
        if walled:
            owner = os.stat(self._files[0][0])
            pairs = [word for name, ro in self._files for word in ("ro" if ro else "rw", name)]
            command = [
                "unshare", "--mount", "--propagation", "private", "--", "/bin/sh", "-euc", _WALLS, "sh",
                self._directory, str(owner.st_uid), str(owner.st_gid), ready, *pairs, "--", *command,
            ]  # fmt: skip
        else:
            open(self.raw, "x").close()
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "SYSTEM": " ".join(_SYSTEM)}
        # In a session of its own: a Ctrl-C is for us, and the disk goes after the guest.
        with tempfile.TemporaryFile("w+") as log:
            try:
                self._daemon = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd="/",
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise ConfigError("disk", path, f"cannot be opened: {command[0]}: {error.strerror}") from None
            # Its input ends when we do, however that is.
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "sh", str(self._daemon.pid), self._directory], stdin=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
            top = f"/proc/{self._daemon.pid}/root" if walled else self._directory
            deadline = time.monotonic() + _PATIENCE
            while not _has_pid(f"{top}/{ready}"):
                if self._daemon.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = (log.read().strip() or "it does not answer").splitlines()[-1]
                    raise ConfigError("disk", path, f"cannot be opened: {said}")
                time.sleep(0.005)
            self.raw = f"{top}/raw"
        self._opened_no_other(path, ready)

    def _opened_no_other(self, path: str, ready: str) -> None:
        """Look at what QEMU has open: somebody may have changed the image's header since it was read here.

        :raises ConfigError: the program has opened another file
        """
        assert self._daemon is not None
        allowed = [os.stat(name) for name, _ in self._files]
        table = f"/proc/{self._daemon.pid}/fd"
        for entry in os.listdir(table):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(f"{table}/{entry}")
                named = any(os.path.samestat(status, each) for each in allowed)
                mine = status.st_nlink == 0 or os.readlink(f"{table}/{entry}").endswith(f"/{ready}")
                if stat.S_ISREG(status.st_mode) and not (named or mine):
                    other = os.readlink(f"{table}/{entry}")
                    raise ConfigError("disk", path, f"names another file, {other}, which may not be opened")

    def close(self) -> None:
        """Write what is left, end the process and forget the raw file; idempotent."""
        if self._daemon is not None:
            self._daemon.terminate()
            try:
                self._daemon.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
            self._daemon = None
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        with contextlib.suppress(OSError):
            shutil.rmtree(self._directory)


def _cluster(path: str, backing_file: str | None, backing_format: str) -> int:
    """Bytes of the image's clusters, once its header was read for what it says of other files.

    :raises ConfigError: the image is not qcow2, or is damaged, or names files that the user did not
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError("disk", path, f"cannot be opened: {os.strerror(error.errno or 0)}") from None
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError("disk", path, "is neither a file nor a block device")
        head = os.pread(fd, 104, 0)
        if len(head) < 72 or head[:4] != MAGIC:
            raise ConfigError("disk", path, "cannot be opened: it is not in qcow2 format")
        _, version, at, size, bits, _, crypt = _V2.unpack_from(head)
        features, length = _V3_AT.unpack_from(head, 72) if version >= 3 and len(head) == 104 else (0, 72)
        if version not in (2, 3) or not 9 <= bits <= 21 or length > _EXTENSIONS_MAX or size > 1023 or at >> 32:
            raise ConfigError("disk", path, "cannot be opened: its qcow2 header is damaged or of a later version")
        backing = os.pread(fd, size, at).decode(errors="replace") if at else ""
        extensions = _extensions(os.pread(fd, _EXTENSIONS_MAX, length))
    except OSError as error:
        raise ConfigError("disk", path, f"cannot be read: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(fd)
    if features & _EXTERNAL_DATA or _DATA_FILE in extensions:
        raise ConfigError(
            "disk", path, "has its data in an external file, which is not opened; qemu-img convert joins them"
        )
    if crypt:
        raise ConfigError("disk", path, "is encrypted by QEMU; only plain qcow2 images are supported")
    if backing and backing_file is None:
        allowed = "backing=FILE (and backing_format=qcow2) says which may be opened in its place"
        if not backing_format:
            allowed = "a backing file cannot have a backing file of its own; qemu-img rebase or commit joins them"
        raise ConfigError("disk", path, f"has the backing file {backing!r}, which is not opened: {allowed}")
    if backing_file is not None and not backing:
        raise ConfigError("backing", backing_file, f"is named, but the image {path} has no backing file")
    named = extensions.get(_BACKING_FORMAT, b"").decode(errors="replace")
    if backing_file is not None and named not in ("", backing_format):
        said = f"is {named!r} by the image {path}, not {backing_format}; say backing_format="
        raise ConfigError("backing", backing_file, said)
    return 1 << int(bits)


def _extensions(table: bytes) -> dict[int, bytes]:
    """The header's extensions by their type."""
    found = {}
    at = 0
    while at + 8 <= len(table):
        kind, size = _EXTENSION.unpack_from(table, at)
        if kind == 0:
            break
        found[kind] = table[at + 8 : at + 8 + size]
        at += 8 + size + -size % 8
    return found


def _node(image_format: str, host_path: str, path: str, read_only: bool) -> dict[str, Any]:
    """An image in QEMU's options: the drivers by name, so that neither contents nor a file's name choose one."""
    driver = "host_device" if stat.S_ISBLK(os.stat(host_path).st_mode) else "file"
    file = {"driver": driver, "filename": path}
    if image_format == "raw":
        return {"driver": "raw", "read-only": read_only, "file": file}
    return {"driver": "qcow2", "read-only": read_only, "backing": None, "file": file}


def _has_pid(path: str) -> bool:
    """Whether QEMU has written its pid file, which is the last that it does before it serves."""
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False
