# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image as a raw file: ``qemu-storage-daemon`` of Debian's qemu-utils shows it by FUSE."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time

from vmm.errors import ConfigError

PROGRAM = "qemu-storage-daemon"
_PATIENCE = 10.0


class Qcow2:
    """An image and the process that shows it, until ``close``. It needs /dev/fuse, and root or ``fusermount3``.

    :param path: the image; a backing file that it names is opened too, so it must be one that you trust
    :param read_only: it stays as it is
    :raises ConfigError: the program is not there, or cannot do it

    ``raw`` is the path of the file that has the image's contents and takes writes, flushes and holes. QEMU locks the
    image. Should this process be killed, the other one ends too, and writes what it has before.
    """

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConfigError("disk", path, f"is qcow2, which needs {PROGRAM}: apt install qemu-system-common")
        self._daemon: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._directory = tempfile.mkdtemp(prefix="pyvmm-qcow2-")
        self.raw = os.path.join(self._directory, "raw")
        try:
            open(self.raw, "x").close()
            self._start(program, path, read_only)
        except BaseException:
            self.close()
            raise

    def _start(self, program: str, path: str, read_only: bool) -> None:
        writable = "off" if read_only else "on"
        # In QEMU's options a comma is written twice.
        image, raw = (name.replace(",", ",,") for name in (os.path.abspath(path), self.raw))
        ready = os.path.join(self._directory, "pid")
        blockdev = (
            f"driver=qcow2,node-name=disk,read-only={'on' if read_only else 'off'},discard=unmap,"
            f"file.driver=file,file.filename={image}"
        )
        export = f"type=fuse,id=export,node-name=disk,mountpoint={raw},writable={writable}"
        # In a session of its own: a Ctrl-C is for us, and the disk goes after the guest.
        with open(os.path.join(self._directory, "log"), "w+") as log:
            self._daemon = subprocess.Popen(
                [program, "--blockdev", blockdev, "--export", export, "--pidfile", ready],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        # Its input ends when we do, however that is.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", f"read _; kill {self._daemon.pid}"], stdin=subprocess.PIPE, start_new_session=True
        )
        deadline = time.monotonic() + _PATIENCE
        while not os.path.exists(ready):
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                with open(os.path.join(self._directory, "log")) as log:
                    said = (log.read().strip() or "it does not answer").splitlines()[-1]
                raise ConfigError("disk", path, f"cannot be opened: {said}")
            time.sleep(0.005)

    def close(self) -> None:
        """Write what is left, end the process and forget the raw file; idempotent."""
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait()
            self._daemon = None
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        with contextlib.suppress(OSError):
            shutil.rmtree(self._directory)

    def __enter__(self) -> Qcow2:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
