# SPDX-License-Identifier: Apache-2.0
"""All errors that pyvmm raises on purpose, named by who is at fault.

``ConfigError`` is a fault of the user or the runtime, ``HostError`` and ``KvmError`` of the host, ``GuestError`` and
its subclasses of the guest. Only this decides what happens next (docs/design.md, "Errors").
"""

from __future__ import annotations

import errno
import os

_LONGEST = 500


def line(value: object) -> str:
    """`value` as part of one line: control characters escaped, and no longer than anybody reads."""
    text = str(value)
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class VmmError(Exception):
    """The root of all errors below."""


class ConfigError(VmmError, ValueError):
    """An invalid request of the user or the runtime: one line with the field, the value and what is allowed.

    :param field: the option or field as the user wrote it, such as ``kernel`` or ``--memory``
    :param value: the value as the user wrote it
    :param problem: one clause: what is wrong with the value, and what is allowed
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(line(f"{field} {value}: ") + problem if value not in (None, "") else f"{field}: {problem}")
        self.field = field
        self.value = value
        self.problem = problem


class HostError(VmmError, OSError):
    """The host refused something that pyvmm needs: an ioctl, a file, a tap.

    :param errno: the system's error number
    :param what: the failed operation, such as ``KVM_CREATE_VM`` or ``open disk``
    :param path: its file or device, if any
    """

    def __init__(self, errno: int, what: str, path: str | None = None) -> None:
        super().__init__(errno, os.strerror(errno), path)
        self.what = what

    def __str__(self) -> str:
        where = f" {line(self.filename)}" if self.filename else ""
        return f"{self.what}{where}: {self.strerror}"


class host_errors:
    """A context in which an OSError, or that no thread is left, becomes a ``HostError``.

    :param what: as for ``HostError``
    :param path: likewise; None: the file that the OSError is about
    """

    __slots__ = ("_path", "_what")

    def __init__(self, what: str, path: str | None = None) -> None:
        self._what = what
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, HostError):
            raise HostError(error.errno or errno.EIO, self._what, self._path or path_of(error) or None) from None
        if error is not None and _is_no_thread(error):
            raise HostError(errno.EAGAIN, self._what, self._path) from None


class KvmError(HostError):
    """An ioctl on a KVM file descriptor failed; ``what`` is its name in ``<linux/kvm.h>``."""


class SnapshotError(VmmError):
    """A machine cannot be saved or restored.

    :param what: the device, file or part concerned
    :param problem: what is wrong with it, one clause
    """

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(f"{line(what)}: {line(problem)}")
        self.what = what
        self.problem = problem


class GuestError(VmmError):
    """The guest did something that a correct guest never does."""


class GuestMemoryError(GuestError):
    """``size`` bytes at guest physical address ``gpa`` are not all inside one region of guest RAM."""

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__(f"guest address {gpa:#x}+{size:#x} is not in guest memory")
        self.gpa = gpa
        self.size = size


class BadChain(GuestError):
    """A virtqueue broke a rule; its device gets DEVICE_NEEDS_RESET and the VM lives.

    :param queue: index of the queue in its device
    :param head: head descriptor of the chain, or -1 where the ring itself is broken
    :param index: descriptor at which the rule was broken
    :param rule: the rule, with its section in virtio 1.2
    """

    def __init__(self, queue: int, head: int, index: int, rule: str) -> None:
        super().__init__(f"queue {queue}, head {head}, descriptor {index}: {rule}")
        self.queue = queue
        self.head = head
        self.index = index
        self.rule = rule


def path_of(error: OSError) -> str:
    """The file that an error is about: of two, as of a copy, the one that was written where its disk was the problem.

    Empty: it names none.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    path = error.filename2 if full and error.filename2 else error.filename
    return os.fsdecode(path) if isinstance(path, (str, bytes)) else ""


def _is_no_thread(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def host_problem(error: BaseException) -> str | None:
    """One line for what the host or its limits did, whoever met it; None: `error` is a mistake of ours."""
    match error:
        case VmmError():
            return str(error)
        case OSError():
            path = path_of(error)
            return f"{path}: {error.strerror}" if path else error.strerror or str(error)
        case MemoryError():
            return "the host has no memory for it"
        case _ if _is_no_thread(error):
            return "the host has no thread for it: a limit of processes or of memory is reached"
        case ImportError() if "Too many open files" in str(error):
            return "Too many open files"
        case UnicodeEncodeError():
            return f"{error.object!a} is not UTF-8, which is needed here"
    return None
