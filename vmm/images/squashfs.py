# SPDX-License-Identifier: Apache-2.0
"""A merged tree becomes a squashfs, by squashfs-tools: straight from a tar stream, so that nothing is unpacked here."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from copy import copy
from pathlib import Path

from vmm.images.host import Progress, PullError, tool
from vmm.images.layers import Tree

# lz4: half the size, and a guest reads it as quickly as a plain file
COMPRESSION = ("-comp", "lz4")
_PIPE = 1 << 20  # bytes; what a pipe may have at most without privileges
_BUFFER = 1 << 16  # bytes; tarfile copies all of it for every piece that it writes


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
        with suppress(OSError):  # a user's pipes have a limit
            fcntl.fcntl(sqfstar.stdin, fcntl.F_SETPIPE_SZ, _PIPE)
        try:
            with sqfstar.stdin, tarfile.open(
                fileobj=sqfstar.stdin, mode="w|", bufsize=_BUFFER, format=tarfile.PAX_FORMAT, encoding="utf-8",
                errors="surrogateescape",
            ) as tar:  # fmt: skip
                tar.copybufsize = 4 * _BUFFER  # type: ignore[attr-defined]  # no stub has it
                done = 0
                names: dict[int, str] = {}
                for path, inode in entries:
                    header = copy(inode.header)
                    header.name = path
                    first = names.setdefault(id(inode), path)
                    if first != path and header.isreg():
                        header.type, header.linkname, header.size = tarfile.LNKTYPE, first, 0
                    with inode.open() as file:
                        tar.addfile(header, file)
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep all
                    done += inode.header.size
                    progress("making the file system", done / total)
        except BrokenPipeError:
            pass  # it says why
        except BaseException:
            sqfstar.kill()
            raise
        status = sqfstar.wait()
        errors.seek(0)
        said = errors.read(1 << 16).decode(errors="replace").strip().splitlines()
    if status:
        raise PullError(f"sqfstar: {said[-1] if said else f'exit status {status}'}")
