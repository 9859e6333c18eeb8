# SPDX-License-Identifier: Apache-2.0
"""A merged tree becomes a squashfs, by squashfs-tools: straight from a tar stream, so that nothing is unpacked here."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tarfile
import tempfile
from copy import copy
from pathlib import Path

from vmm.images.host import Progress, PullError, tool
from vmm.images.layers import Inode, Tree

# lz4: half the size, and a guest reads it as quickly as a plain file
COMPRESSION = ("-comp", "lz4")
_PIPE = 1 << 20  # bytes; what a pipe may have at most without privileges


def write(tree: Tree, image: Path, progress: Progress) -> None:
    """Write the file system of that tree to a new file.

    :raises PullError: sqfstar is missing, or fails
    """
    entries = list(tree.walk())
    total = sum(inode.header.size for _, inode in entries) or 1
    root = tree.root.inode.header
    argv = [
        tool("sqfstar"), *COMPRESSION, "-quiet", "-no-progress", "-exit-on-error",
        "-root-mode", f"{root.mode:o}", "-root-uid", str(root.uid), "-root-gid", str(root.gid),
        "-root-time", str(root.mtime), "-mkfs-time", "0", str(image),
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "LC_ALL": "C"}
        ) as sqfstar,
    ):
        assert sqfstar.stdin is not None
        pipe = sqfstar.stdin.fileno()
        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
        except OSError:
            pass  # a user's pipes have a limit
        try:
            done = 0
            names: dict[int, str] = {}
            for path, inode in entries:
                _entry(pipe, path, inode, names)
                done += inode.header.size
                progress("making the file system", done / total)
            _write(pipe, bytes(2 * tarfile.BLOCKSIZE))
        except BrokenPipeError:
            pass  # it says why
        except BaseException:
            sqfstar.kill()
            raise
        finally:
            sqfstar.stdin.close()
        status = sqfstar.wait()
        errors.seek(0)
        said = errors.read(1 << 16).decode(errors="replace").strip().splitlines()
    if status:
        raise PullError(f"sqfstar: {said[-1] if said else f'exit status {status}'}")


def _entry(pipe: int, path: str, inode: Inode, names: dict[int, str]) -> None:
    header = copy(inode.header)
    header.name = path
    first = names.setdefault(id(inode), path)
    if first != path and header.isreg():
        header.type, header.linkname, header.size = tarfile.LNKTYPE, first, 0
    _write(pipe, header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    if header.size:  # of a further name it is 0
        with inode.open() as file:
            while piece := file.read(_PIPE):
                _write(pipe, piece)
        _write(pipe, bytes(-header.size % tarfile.BLOCKSIZE))


def _write(pipe: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]
