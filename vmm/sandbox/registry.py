# SPDX-License-Identifier: Apache-2.0
"""The running sandboxes of this user: a directory each, with the VM's socket and a lock that its process holds.

``$XDG_RUNTIME_DIR/pyvmm/sandboxes/NAME/{v,lock,about.json}``; without that variable below ``/tmp/pyvmm-UID``.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import secrets
import shutil
import stat

from vmm.config.devices import MAX_UDS_PATH
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

NAME_MAX = 32
SOCKET = "v"
_ENDED = "ended"  # the file with the reason of the end


def root() -> str:
    """The directory of the directories, which is made.

    :raises ConfigError: the directory belongs to another user
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isabs(base) or not os.path.isdir(base):
        base = f"/tmp/pyvmm-{os.getuid()}"
        os.makedirs(base, 0o700, exist_ok=True)
        status = os.lstat(base)
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
            raise ConfigError(
                "XDG_RUNTIME_DIR", "", f"is not set, and others can access {base}: set it to a private directory"
            )
    path = os.path.join(base, "pyvmm", "sandboxes")
    os.makedirs(path, 0o700, exist_ok=True)
    return path


class Place:
    """The directory of one sandbox, as long as it runs; gone by ``close``.

    :param name: None: one is made up
    :param about: what ``all_running`` is to tell of it
    :raises ConfigError: the name cannot be, or another one that runs has it
    """

    def __init__(self, name: str | None, about: dict[str, Any]) -> None:
        if name is not None:
            check(name)
        directory = root()
        self._pid = os.getpid()
        self.name = name or f"sb-{secrets.token_hex(4)}"
        self.path = os.path.join(directory, self.name)
        self.socket = os.path.join(self.path, SOCKET)
        if len(os.fsencode(self.socket)) > MAX_UDS_PATH:
            raise ConfigError("XDG_RUNTIME_DIR", directory, "is too long for a unix socket in it")
        _sweep(directory)
        with _alone(directory):
            if _is_held(self.path):
                raise ConfigError("name", self.name, "is the name of another running sandbox")
            shutil.rmtree(self.path, ignore_errors=True)
            os.mkdir(self.path, 0o700)
            self._lock = os.open(os.path.join(self.path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            with open(os.path.join(self.path, "about.json"), "w", encoding="utf-8") as file:
                json.dump({**about, "pid": os.getpid()}, file)
        except BaseException:
            self.close()
            raise

    @property
    def is_ours(self) -> bool:
        """Whether this process has made it; a forked child of that has not."""
        return self._pid == os.getpid()

    def tell(self, why: str) -> None:
        """Tell other processes why the sandbox has ended. The first reason counts."""
        try:
            with open(os.path.join(self.path, _ENDED), "x", encoding="utf-8") as file:
                file.write(why)
        except OSError:
            pass  # it was told before, or the disk is full: others then hear that it has ended, without the reason

    def close(self) -> None:
        """Remove the directory; idempotent."""
        lock, self._lock = self._lock, -1  # first: two threads may close it at once
        if lock >= 0:
            with _alone(os.path.dirname(self.path)):
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)


def check(name: str) -> None:
    """Refuse what cannot be a sandbox's name.

    :raises ConfigError: `name` cannot be one
    """
    if not 0 < len(name) <= NAME_MAX or not all(c.isascii() and (c.isalnum() or c in "-_") for c in name):
        raise ConfigError("name", name, f"must be 1 to {NAME_MAX} letters, digits, - and _")


def all_running() -> list[dict[str, Any]]:
    """What each sandbox told of itself, with its ``name`` and, in ``ended``, why it has ended, or empty.

    What a killed one has left is removed.
    """
    found = []
    directory = root()
    for name in _held(directory):
        path = os.path.join(directory, name)
        try:
            with open(os.path.join(path, "about.json"), encoding="utf-8") as file:
                found.append({**json.load(file), "name": name, "ended": _told(path)})
        except (OSError, ValueError):
            pass  # it begins, or ends
    return found


def why_ended(name: str) -> str:
    """Why the sandbox of that name has ended; empty: it runs."""
    directory = root()
    path = os.path.join(directory, name)
    if told := _told(path):
        return told
    with _alone(directory):
        return "" if _is_held(path) else "the sandbox was closed, or its process has ended"


def about(name: str) -> dict[str, Any]:
    """What a sandbox that runs told of itself.

    :raises ConfigError: no sandbox of that name is running
    """
    check(name)
    found = all_running()
    for each in found:
        if each["name"] == name:
            if each["ended"]:
                raise ConfigError("NAME", name, f"is not running: {each['ended']}")
            return each
    names = ", ".join(each["name"] for each in found) or "none"
    raise ConfigError("NAME", name, f"is not a running sandbox; running: {names}")


def socket_of(name: str) -> str:
    """The VM's socket of the sandbox of that name, whether it runs or not."""
    return os.path.join(root(), name, SOCKET)


def _told(path: str) -> str:
    # Why the sandbox has ended that still has this directory; empty: it has not told.
    try:
        with open(os.path.join(path, _ENDED), encoding="utf-8") as file:
            return file.read() or "the sandbox has ended"
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    # While nobody else makes or removes a sandbox's directory there, or asks whether it is held. Without it, one that
    # is being made, and not held yet, would be taken for that of a killed process.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a process that was forked meanwhile has the descriptor, too
        os.close(fd)


def _held(directory: str) -> list[str]:
    # The names of those that run. What killed ones have left is removed.
    held = []
    with _alone(directory):
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            if _is_held(path):
                held.append(name)
            else:
                shutil.rmtree(path, ignore_errors=True)
    return held


@functools.cache  # once in a process: one that starts thousands need not look at all of them each time
def _sweep(directory: str) -> None:
    _held(directory)


def _is_held(path: str) -> bool:
    try:
        fd = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
