# SPDX-License-Identifier: Apache-2.0
"""``pyvmm prepare``: save an interpreter that has imported pyvmm, so that later starts go on from there.

The file is a start image (``vmm/start_image.h``). This side makes it: a process imports what any VM needs, copies
itself (``vmm/_start_image.pyx``), and writes the copy's memory, of which it leaves out what is zero and what is in a
file already. The launcher does the rest, or starts an interpreter if the image does not fit.
"""

from __future__ import annotations

import errno
import gc
import itertools
import os
import struct
import sys

from vmm import launched
from vmm.errors import HostError, host_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import signal as _signal
    import subprocess
else:
    import _signal  # `signal` makes enumerations, which no start needs

MAGIC = b"pyvmmSI1"
PAGE = 4096
# The main thread's stack goes on at the address where the saved one was, and cannot grow as the kernel's does.
STACK_BYTES = 8 << 20
# Of vmm/start_image.h: the head behind its magic, a segment, a part of the vDSO, a file, a descriptor.
_HEAD, _SEGMENT, _PART, _FILE, _DESCRIPTOR = "17Q", "5Q", "2Q", "4Q", "2Q"
_ZEROS, _ITSELF, _WIPED, _FILES = range(4)
_READ, _WRITE, _EXECUTE = 1, 2, 4  # PROT_*
_TRIES = 3
_STANDARD = 3  # stdin, stdout, stderr
# A library's own descriptor has a number from here on: a lower one is the socket's, or whose the launcher inherits.
_FREE = 200
_LARGEFILE = 0o100000  # the kernel's O_LARGEFILE, which any open() sets
_SEEDED = {"random", "_random", "_ssl", "_hashlib", "tempfile"}  # what has random numbers, or names by them, of its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm prepare``."""
    parser.add_argument("--remove", action="store_true", help="remove what an earlier `pyvmm prepare` has saved")


def image_path() -> str:
    """Where the launcher looks for it: beside what Python compiles."""
    from vmm.commands.link import import_path

    python = f"python{sys.version_info[0]}.{sys.version_info[1]}{'t' * ('t' in sys.abiflags)}"
    return f"{import_path()[0]}/vmm/__pycache__/start-{python}.image"


def main(args: argparse.Namespace) -> int:
    """Make the image and start from it once, or remove it. 1: this host cannot.

    :raises OSError: the image cannot be replaced or removed
    """
    import contextlib
    import resource
    import subprocess

    from vmm.commands.link import import_path, program

    path = image_path()
    if args.remove:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    new = f"{path}.{os.getpid()}"
    places = import_path()
    options = {"pyvmm": "pyvmm", "pyvmm_path": ":".join(places), "pyvmm_save": new}
    words = [word for name, value in options.items() for word in ("-X", f"{name}={value}")]
    command = [sys.executable, "-I", "-S", *words, f"{places[0]}/vmm/__main__.py"]
    # CPython 3.14 asks once how far the stack may grow.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    # By UTF-8, whatever the language is here, and with no wish of a linker.
    saved = subprocess.run(
        command, env={"LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (stack, hard)),
    )  # fmt: skip
    try:
        if saved.returncode:
            return _tell(saved)
        os.replace(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
    environment = {"PATH": os.environ.get("PATH", os.defpath), "PYVMM_START": "warm"}
    for _ in range(_TRIES):  # the kernel may have put something of a new process where the image has its own
        tried = subprocess.run([program(), "--version"], env=environment, capture_output=True, text=True)
        if not tried.returncode:
            print(path)
            return 0
    os.unlink(path)
    return _tell(tried)


def _tell(failed: subprocess.CompletedProcess[str]) -> int:
    ended = f"status {failed.returncode}" if failed.returncode > 0 else f"signal {-failed.returncode}"
    problem = failed.stderr.strip().rpartition("\n")[2] or ended
    print(f"pyvmm prepare: starts stay as they are: {problem}", file=sys.stderr)
    return 1


def save(path: str) -> None:
    """Import what any VM needs, and write the image; then the process ends. Returns wherever it is started from."""
    from vmm import _start_image

    taken = [os.dup(0)]
    while taken[-1] < _FREE - 1:
        taken.append(os.dup(0))
    _import_all()
    for number in taken:
        os.close(number)
    for number in _signal.valid_signals() - {_signal.SIGPIPE, _signal.SIGXFSZ}:  # those two are the interpreter's
        if _signal.getsignal(number) == _signal.SIG_IGN:  # as after nohup: here, and not where it goes on
            _signal.signal(number, _signal.SIG_DFL)
    gc.collect()
    gc.freeze()
    status = 1
    try:
        # A thread would be missing where it goes on, and random numbers would be the same.
        if (threads := len(os.listdir("/proc/self/task"))) > 1:
            raise HostError(errno.EBUSY, f"copy a process with {threads} threads")
        descriptors = _descriptors()
        if same := _SEEDED & sys.modules.keys():
            raise HostError(errno.EBUSY, f"copy a process that has imported {' and '.join(sorted(same))}")
        if (child := _start_image.hold()) == 0:
            return launched.resume()
        try:
            os.waitpid(child, os.WUNTRACED)
            _Writer(child, *_start_image.addresses()).write(path, _start_image.cpu_words(), descriptors)
            status = 0
        finally:
            os.kill(child, _signal.SIGKILL)
            os.waitpid(child, 0)
    except OSError as error:
        print(host_problem(error), file=sys.stderr, flush=True)
    os._exit(status)


def _import_all() -> None:
    # In the order of a start, with what it spares.
    from vmm.jail import preload

    launched.spare_threading()
    preload.load(["vmm.commands.serve"])
    launched.spare_httptools()
    preload.load(["vmm.api.server"])
    launched.spare_msgspec()
    preload.load(["vmm.api.actions"])
    launched.spare_collections("vmm.machine.machine")
    preload.load(("vmm.commands.run", *preload.OURS, *preload.LATER))


def _descriptors() -> list[tuple[int, str]]:
    # The descriptors of libraries, and their files: since CPython 3.14 `_ctypes` has libffi open its own, to map more
    # of it once a program has many callbacks (cpython#135893). Any other would be another file's at a start.
    import fcntl

    with open("/proc/self/maps") as maps:
        mapped = {line.rstrip("\n").split(maxsplit=5)[-1] for line in maps}
    found = []
    for number in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            file = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # by which listdir() has read them
        if number < _STANDARD:
            continue
        flags = fcntl.fcntl(number, fcntl.F_GETFL) & ~_LARGEFILE
        if file not in mapped or flags != os.O_RDONLY or os.lseek(number, 0, os.SEEK_CUR):
            raise HostError(errno.EBUSY, f"copy a process whose descriptor {number} is", file)
        found.append((number, file))
    return found


class _Writer:
    # Reads the memory of a stopped copy of this process.

    def __init__(self, child: int, thread: int, given: int, registers: int) -> None:
        self._child, self._thread, self._given = child, thread, given
        self._memory = os.open(f"/proc/{child}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._registers = struct.unpack("3Q", self._read(registers, 24))
        self._segments: list[tuple[int, int, int, int, int]] = []  # offsets in the image are those in `saved`
        self._parts: list[tuple[int, int]] = []
        self._files: dict[str, int] = {}
        self._saved = bytearray()

    def write(self, path: str, cpu: tuple[int, ...], descriptors: list[tuple[int, str]]) -> None:
        """Write the image.

        :param path: a new file
        :param cpu: ``_start_image.cpu_words``
        :param descriptors: ``_descriptors``
        """
        with open(f"/proc/{self._child}/smaps") as maps:
            mapping = ""
            for line in maps:
                word, *flags = line.split()
                if word == "VmFlags:":
                    self._take(mapping, "wf" in flags)
                elif not word.endswith(":"):
                    mapping = line
        own = [(number, self._number(file)) for number, file in descriptors]
        libraries = len(self._files)
        for module in list(sys.modules.values()):
            if file := getattr(module, "__file__", None):
                self._number(file)
        code = self._read(*self._parts[-1])
        named = [os.fsencode(name) + b"\0" for name in (*self._files, os.path.dirname(sys.executable))]
        tables = ((_SEGMENT, self._segments), (_PART, self._parts), (_FILE, self._files), (_DESCRIPTOR, own))
        counts = [len(rows) for _, rows in tables]
        head = len(MAGIC) + struct.calcsize(_HEAD)
        first = head + sum(struct.calcsize(form) * len(rows) for form, rows in tables)
        *names, end = itertools.accumulate(map(len, named), initial=first)
        memory = _up_to_page(end)
        vdso = memory + len(self._saved)
        with open(path, "xb") as image:
            os.fchmod(image.fileno(), 0o644)
            image.write(MAGIC)
            numbers = (vdso + len(code), head, *counts, libraries, names[-1], vdso, *cpu, self._thread, self._given)
            image.write(struct.pack(_HEAD, *numbers, *self._registers))
            for start, length, protection, source, offset in self._segments:
                at = offset + memory if source == _ITSELF else offset
                image.write(struct.pack(_SEGMENT, start, length, protection, source, at))
            image.writelines(struct.pack(_PART, *part) for part in self._parts)
            for file, at in zip(self._files, names, strict=False):
                now = os.stat(file)
                image.write(struct.pack(_FILE, now.st_size, *divmod(now.st_mtime_ns, 10**9), at))
            image.writelines(struct.pack(_DESCRIPTOR, *each) for each in own)
            image.write(b"".join(named).ljust(memory - first, b"\0"))
            image.write(self._saved)
            image.write(code)
            image.flush()
            os.fsync(image.fileno())  # a start from a file that lost its pages would crash

    def _take(self, line: str, wiped: bool) -> None:
        # One line of /proc/PID/maps; `wiped`: the child of a fork has zeros there, as this child of one has, too.
        place, permissions, offset, _, _, *rest = line.rstrip("\n").split(maxsplit=5)
        start, end = (int(each, 16) for each in place.split("-"))
        length, name = end - start, "".join(rest)
        bits = zip(permissions, (_READ, _WRITE, _EXECUTE), strict=False)
        protection = sum(bit for letter, bit in bits if letter != "-")
        if name.startswith(("[vvar", "[vdso")):
            self._parts.append((start, length))
        elif wiped or not protection:
            self._segments.append((start, length, protection, _WIPED if wiped else _ZEROS, 0))
        elif name != "[vsyscall]":
            data = self._read(start, length)
            # What the linker has written to, and protected then, differs from its file.
            at = int(offset, 16)
            if name.startswith("/") and not protection & _WRITE and data == _contents(name, at, length):
                self._segments.append((start, length, protection, _FILES + self._number(name), at))
                return
            if name == "[stack]":
                self._segments.append((end - STACK_BYTES, STACK_BYTES - length, protection, _ZEROS, 0))
            used = _up_to_page(len(data.rstrip(b"\0")))
            if used:
                self._segments.append((start, used, protection, _ITSELF, len(self._saved)))
                self._saved += data[:used]
            if used < length:
                self._segments.append((start + used, length - used, protection, _ZEROS, 0))

    def _read(self, start: int, length: int) -> bytes:
        data = b""
        while len(data) < length:
            data += os.pread(self._memory, length - len(data), start + len(data))
        return data

    def _number(self, file: str) -> int:
        return self._files.setdefault(file, len(self._files))


def _up_to_page(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _contents(name: str, offset: int, length: int) -> bytes:
    with open(name, "rb") as file:
        file.seek(offset)
        return file.read(length).ljust(length, b"\0")
