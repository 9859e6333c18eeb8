# SPDX-License-Identifier: Apache-2.0
"""The lab: a machine with real KVM, emulated by QEMU, that sees this host's files; runs one command and ends.

QEMU's TCG emulates AMD's SVM, so Debian's kernel in it has a working kvm_amd on any host. The files of this host that
the command needs (needed.py) are read-only under an overlay. What the command writes is gone afterwards, except in
writable directories. /proc, /sys, /dev and /run belong to the lab.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmm.config import parse_size
from vmm.errors import ConfigError, VmmError
from vmm.images.host import Progress
from vmm.lab import qemu as qemus
from vmm.lab import view as views
from vmm.lab.image import lab_image
from vmm.lab.machine import CPU, Boot, Died, NotUp, console_of, missing, qemu_argv
from vmm.lab.needed import needed
from vmm.machine.terminal import raw

__all__ = ["LabError", "missing", "run"]

STATUS_TIME = 124
# Of the environment, what a command may need to run as it would here.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TERM", "TMPDIR", "USER", "VIRTUAL_ENV", "CI", "COLUMNS")
_KEPT_PREFIXES = ("XDG_", "PYTHON", "PYVMM_", "PYTEST_")


class LabError(VmmError):
    """The lab cannot be had here, or its machine died."""


def run(
    argv: Sequence[str],
    *,
    write: Sequence[str] = (),
    read: Sequence[str] = (),
    host_root: bool = False,
    timeout: float = 600,
    cpus: int = 2,
    memory: str = "3G",
    cpu: str = CPU,
    qemu: str | None = None,
    stdin: int | None = 0,
    stdout: int = 1,
    stderr: int = 2,
    verbose: bool = False,
) -> int:
    """Run a command in the lab, in this directory.

    :param write: directories that stay writable: what is written there is written here
    :param read: files and directories that it sees, beside those it needs and names
    :param host_root: show all files of this host
    :param timeout: seconds for everything, the machine's boot included
    :param cpus: CPUs for the command: CPU 1 and more, because a guest on CPU 0 may hang
    :param memory: memory of the machine, as for QEMU's -m
    :param cpu: the machine's, as QEMU's -cpu takes it
    :param qemu: the QEMU to use; None for the best there is
    :param stdin: descriptor it reads; None for none. A terminal gives it a terminal
    :param stdout: descriptor for its output, which comes byte for byte
    :param stderr: likewise for its errors
    :returns: its exit status, 128 + the number of the signal that ended it; 124 when the time was over
    :raises ConfigError: a file or directory is not there, or the memory is more than this host has free
    :raises LabError: something is missing here, or the machine died, twice
    """
    if lacks := missing():
        raise LabError(f"missing for the lab: {'; '.join(lacks)}")
    writable = []
    for path in write:
        if not os.path.isdir(path):
            raise ConfigError("--write", path, "is not a directory")
        if os.path.realpath(path).split("/")[1] in ("", "dev", "proc", "sys"):
            raise ConfigError("--write", path, "is a directory of the lab itself; give one below it")
        if "\n" in path:
            raise ConfigError("--write", repr(path), "must not contain a newline")
        writable.append(os.path.realpath(path))
    for path in read:
        if not os.path.exists(path) or "\n" in path:
            raise ConfigError("--read", repr(path) if "\n" in path else path, "is not there")
    size, free = parse_size("--memory", memory), _free_memory()
    if size > free:
        raise ConfigError("--memory", memory, f"this host has {free >> 20}M free")
    say = _progress()
    image = lab_image(say)
    emulator = qemus.choose(qemu, say)
    environment = _environment()
    deadline = time.monotonic() + timeout
    terminal = stdin is not None and os.isatty(stdin) and os.isatty(stdout)
    with tempfile.TemporaryDirectory(prefix="pyvmm-lab-") as place:
        job, view, listing = (f"{place}/{name}" for name in ("job", "view", "listing"))
        os.mkdir(job)
        os.mkdir(view)
        Path(job, "run").write_text(_script(argv, environment))
        Path(job, "writable").write_text("".join(f"w{i} {path}\n" for i, path in enumerate(writable)))
        Path(job, "modules").write_text(f"{image.version} {os.path.realpath(image.modules)}\n")
        shown = "\n".join([*needed(argv, environment, [*read, image.modules]), ""])
        Path(listing).write_text(shown, encoding="utf-8", errors="surrogateescape")
        if terminal:
            columns, rows = _size_of(stdout)
            Path(job, "terminal").write_text(f"{rows} {columns}\n")

        def command(ports: dict[str, int]) -> list[str]:
            machine = qemu_argv(
                emulator, image, cpu=cpu, cpus=cpus, memory=f"{size >> 20}M", job=job,
                host="/" if host_root else view, writable=writable, ports=ports,
            )  # fmt: skip
            return machine if host_root else [sys.executable, "-I", views.__file__, view, listing, *machine]

        again = True
        while True:
            boot = Boot(command, emulator.env, stdin, stdout, stderr, framed=not terminal)
            try:
                # If we are to end, the machine is first.
                with boot, raw(stdin if terminal else None, {signal.SIGINT: boot.interrupt}):
                    status = boot.run(deadline)
            except Died as failure:
                if again and isinstance(failure, NotUp):
                    again = False
                    print(f"pyvmm lab: the machine failed ({failure}); trying once more", file=sys.stderr)
                    continue
                tail = "\n".join(console_of(job).splitlines()[-20:])
                raise LabError(f"the machine failed: {failure}\n{tail}".rstrip()) from None
            finally:
                if verbose:
                    print(console_of(job), file=sys.stderr)
            if status is None:
                print(f"pyvmm lab: the time limit of {timeout:g} s is over", file=sys.stderr)
                return STATUS_TIME
            return status


def _size_of(terminal: int) -> tuple[int, int]:
    try:
        return os.get_terminal_size(terminal)
    except OSError:
        return 80, 24  # it is gone by now


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}


def _script(argv: Sequence[str], env: Mapping[str, str]) -> str:
    # dash cannot export a name that is not an identifier; env can.
    pairs = [f"{name}={value}" for name, value in {**env, "PYVMM_LAB": "1"}.items()]
    command = shlex.join(["env", "-i", *pairs, *argv])
    return f"echo $$ >/run/pyvmm-lab.pid\ncd {shlex.quote(os.getcwd())} || exit\nexec {command}\n"


def _free_memory() -> int:
    # Bytes that may be had, the file cache and swap included.
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree"))


def _progress() -> Progress:
    # The first time only: a kernel to fetch, 70 MB. Each step is said once.
    said: set[str] = set()

    def say(step: str, done: float | None) -> None:
        if step not in said:
            said.add(step)
            print(f"pyvmm lab: {step}", file=sys.stderr)

    return say
