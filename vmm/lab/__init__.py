# SPDX-License-Identifier: Apache-2.0
"""The lab: a machine with real KVM, emulated by QEMU, that sees this host's files; runs one command and ends.

QEMU's TCG emulates AMD's SVM, so Debian's kernel in it has a working kvm_amd, on any host. The host's root is there read-only
under an overlay of the lab's own: what the command writes is gone afterwards, except in directories given as writable.
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

from vmm.errors import ConfigError, VmmError
from vmm.lab.image import lab_image
from vmm.lab.machine import Boot, NotUp, console_of, missing, qemu_argv

__all__ = ["LabError", "missing", "run"]

STATUS_TIME = 124
TRIES = 2
# Of the environment, what a command may need to run as it would here.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TERM", "TMPDIR", "USER", "VIRTUAL_ENV", "CI", "COLUMNS")
_KEPT_PREFIXES = ("XDG_", "PYTHON", "PYVMM_", "PYTEST_")


class LabError(VmmError):
    """The lab cannot be had here, or its machine died."""


def run(
    argv: Sequence[str],
    *,
    write: Sequence[str] = (),
    timeout: float = 600,
    cpus: int = 2,
    memory: str = "3G",
    env: Mapping[str, str] | None = None,
    stdin: int | None = 0,
    stdout: int = 1,
    stderr: int = 2,
    verbose: bool = False,
) -> int:
    """Run a command in the lab, in this directory.

    :param write: directories that stay writable: what is written there is written here
    :param timeout: seconds for everything, the machine's boot included
    :param memory: of the machine, as QEMU takes it
    :param env: the command's environment; None for what matters of ours
    :param stdin: descriptor it reads; None for none. A terminal gives it a terminal
    :param stdout: descriptor for its output, which comes byte for byte
    :param stderr: likewise for its errors
    :returns: its exit status, 128 + the number of the signal that ended it; 124 when the time was over
    :raises ConfigError: a directory is not there
    :raises LabError: something is missing here, or the machine died, twice
    """
    if lacks := missing():
        raise LabError(f"the lab lacks {'; '.join(lacks)}")
    writable = []
    for path in write:
        if not os.path.isdir(path):
            raise ConfigError("--write", path, "is not a directory")
        writable.append(os.path.realpath(path))
    image = lab_image(_progress(verbose))
    deadline = time.monotonic() + timeout
    terminal = stdin is not None and os.isatty(stdin) and os.isatty(stdout)
    with tempfile.TemporaryDirectory(prefix="pyvmm-lab-") as job:
        Path(job, "run").write_text(_script(argv, _environment() if env is None else env))
        Path(job, "writable").write_text("".join(f"w{i} {path}\n" for i, path in enumerate(writable)))
        if terminal:
            columns, rows = os.get_terminal_size(stdout)
            Path(job, "terminal").write_text(f"{rows} {columns}\n")
        for attempt in range(1, TRIES + 1):
            boot = Boot(
                lambda ports: qemu_argv(
                    image, cpus=cpus, memory=memory, job=job, writable=writable, ports=ports
                ),
                stdin, stdout, stderr, framed=not terminal,
            )  # fmt: skip
            try:
                with boot:
                    status = _attended(boot, deadline, stdin if terminal else None)
            except NotUp as failure:
                if attempt < TRIES and "under the command" not in str(failure):
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
    raise LabError("the machine failed")


def _attended(boot: Boot, deadline: float, terminal: int | None) -> int | None:
    # With Ctrl-C passed on, and the terminal, if there is one, in raw mode.
    saved = None
    before = None
    try:
        before = signal.signal(signal.SIGINT, lambda number, frame: boot.interrupt())
    except ValueError:
        pass  # not the main thread: signals are somebody else's
    try:
        if terminal is not None:
            import termios
            import tty

            saved = termios.tcgetattr(terminal)
            tty.setraw(terminal)
        return boot.run(deadline)
    finally:
        if saved is not None and terminal is not None:
            import termios

            termios.tcsetattr(terminal, termios.TCSANOW, saved)
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _environment() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }


def _script(argv: Sequence[str], env: Mapping[str, str]) -> str:
    # dash cannot export a name that is no identifier; env can.
    pairs = [f"{name}={value}" for name, value in {**env, "PYVMM_LAB": "1"}.items()]
    command = shlex.join(["env", "-i", *pairs, *argv])
    return f"cd {shlex.quote(os.getcwd())} || cd /\nexec {command}\n"


def _progress(verbose: bool):  # type: ignore[no-untyped-def]  # of vmm.images.host.Progress's shape
    def say(step: str, done: float | None) -> None:
        if verbose and not done:
            print(f"pyvmm lab: {step}", file=sys.stderr)

    return say
