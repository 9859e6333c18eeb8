# SPDX-License-Identifier: Apache-2.0
"""Which VMs of pyvmm run on this host, by what /proc tells of their processes: a start pays nothing for it.

A process is one of ours if it has a VM of KVM and our vCPU loop mapped. Another user's are seen by root alone.
"""

from __future__ import annotations

import os
import stat
import time
from typing import NamedTuple

from vmm.commands.cli import COMMANDS, PROGRAMS
from vmm.config import did_you_mean
from vmm.errors import ConfigError
from vmm.machine.console_socket import MARK
from vmm.sandbox import registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Running(NamedTuple):
    """A VM, or a program with several.

    :ivar kind: the subcommand that runs it: run, serve, jailer or sandbox; python for another program, copy for an
        isolated fork of such a program's VM
    :ivar image: the image or kernel of the command line, or the program
    :ivar state: running, paused or not started; of a sandbox that nobody has closed yet, ended
    :ivar began: seconds since the epoch
    :ivar memory: resident bytes of the process, its part of guest RAM with them
    :ivar cpu: seconds of processor time
    :ivar ticks: when the process began, which tells it from another one with its number later
    """

    name: str
    kind: str
    pid: int
    state: str
    image: str
    began: float
    memory: int
    cpu: float
    ticks: int
    words: tuple[str, ...]


def find() -> list[Running]:
    """All of them, by name."""
    sandboxes: dict[int, list[dict[str, object]]] = {}
    try:
        registered = registry.all_running()
    except (ConfigError, OSError):
        registered = []  # their place is not ours or cannot be made, as on a full disk: then there are none
    for each in registered:
        sandboxes.setdefault(each["pid"], []).append(each)
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if (seen := _look(pid)) is None:
                continue
        except OSError:
            continue  # it ended, or is another user's
        own = sandboxes.pop(pid, [])
        for each in own:
            kind = seen.kind if seen.kind == "sandbox" else "python"
            state = "ended" if each["ended"] else seen.state
            found.append(seen._replace(name=str(each["name"]), image=str(each["image"]), kind=kind, state=state))
        if not own:
            found.append(seen)
    return sorted(found)


def named(word: str) -> Running:
    """The one with the name, or the process number, `word`.

    :raises ConfigError: there is no such VM, or more than one
    """
    running = find()
    found = [each for each in running if each.name == word] or [each for each in running if str(each.pid) == word]
    if not found:
        names = ", ".join(each.name for each in running) or "none"
        guess = did_you_mean(word, [each.name for each in running]) or ";"
        raise ConfigError("NAME", word, f"is not the name or PID of a VM that runs here{guess} there is: {names}")
    if len(found) > 1:
        pids = ", ".join(str(each.pid) for each in found)
        raise ConfigError("NAME", word, f"is the name of {len(found)} VMs; give a PID: {pids}")
    return found[0]


def option(words: tuple[str, ...], name: str) -> str | None:
    """The value of the option `name` in a command line, or None."""
    for index, word in enumerate(words):
        if word == name:
            return words[index + 1] if index + 1 < len(words) else None
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def path_in(pid: int, path: str) -> str:
    """Where we find what the process names `path`: it may be in a jail, and has a current directory of its own."""
    return f"/proc/{pid}/root{path}" if os.path.isabs(path) else f"/proc/{pid}/cwd/{path}"


def began(pid: int) -> int:
    """When the process began, in ticks since the host did.

    :raises ProcessLookupError: the VM has ended
    """
    try:
        return int(_stat(pid)[19])
    except FileNotFoundError:
        raise ProcessLookupError from None


def _stat(pid: int) -> list[str]:
    # proc(5): what follows the name, from the state on.
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _look(pid: int) -> Running | None:
    if not any(target == "anon_inode:kvm-vm" for target in _descriptors(pid)):
        return None
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        if not any("/vmm/kvm/_vcpu." in line for line in file):
            return None
    with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="surrogateescape") as file:
        line = file.read().split("\0")[:-1]
    program = os.path.basename(os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)"))
    kind, words = _command(program, line)
    fields = _stat(pid)
    with open("/proc/uptime", encoding="ascii") as file:
        up = float(file.read().split()[0])
    ticks = int(fields[19])
    since = time.time() - up + ticks / _TICKS
    if kind in ("serve", "jailer"):
        image, name = "", option(words, "--id") or "anonymous-instance"
    else:
        # The first word that is not an option: `run` may have options before it, whose values it would be.
        image = words[0] if words and not words[0].startswith("-") else ""
        name = os.path.basename(image)
        if kind == "copy":  # several of one program
            name = f"{name}-{pid}"
    if not all(each.isalnum() or each in "-_.:@+" for each in name):
        name = ""  # another user's, perhaps: no terminal may obey it, and no shell that completes it
    return Running(
        name or f"{kind}-{pid}", kind, pid, _state(pid, kind, words), image, since,
        int(fields[21]) * _PAGE, (int(fields[11]) + int(fields[12])) / _TICKS, ticks, words,
    )  # fmt: skip


def _descriptors(pid: int) -> Iterator[str]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            pass  # closed meanwhile


def consoles(pid: int) -> list[str]:
    """Where we find the sockets of the consoles that the process has (``console="unix:PATH"``)."""
    mark = f"/memfd:{MARK}"
    names = [target.removeprefix(mark) for target in _descriptors(pid) if target.startswith(mark)]
    return [path_in(pid, name.removesuffix(" (deleted)")) for name in names]


def _command(program: str, line: list[str]) -> tuple[str, tuple[str, ...]]:
    # The subcommand, and what follows it; of another program its script, and what follows that.
    if program in ("pyvmm", *PROGRAMS):  # from a start image, so that no interpreter was executed
        return _subcommand(program, line[1:])
    starts = [index for index, word in enumerate(line) if word.endswith(("/vmm/__main__.py", "/vmm/commands/cli.py"))]
    if not starts and "-c" in line:
        code, *words = line[line.index("-c") + 1 :]
        return "copy" if "vmm.machine.fork_server" in code else "python", tuple(words)
    if not starts:
        words = [word for word in line[1:] if not word.startswith("-")] or line[:1]
        return "python", tuple(words)
    named = next((word.rpartition("/")[2] for word in line if word.startswith("pyvmm=")), "")
    return _subcommand(named, line[starts[0] + 1 :])


def _subcommand(program: str, words: list[str]) -> tuple[str, tuple[str, ...]]:
    if words and words[0] in COMMANDS:
        return words[0], tuple(words[1:])
    return PROGRAMS.get(program, "serve"), tuple(words)


def _state(pid: int, kind: str, words: tuple[str, ...]) -> str:
    if kind in ("serve", "jailer") and "--no-api" not in words:
        from vmm.commands.serve import DEFAULT_SOCKET

        if said := _asked(path_in(pid, option(words, "--api-sock") or DEFAULT_SOCKET)):
            return said
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/comm", encoding="utf-8", errors="replace") as file:
                if file.read().startswith("fc_vcpu"):
                    return "running"
        except OSError:
            pass  # this thread has ended
    return "not started"


def _asked(path: str) -> str:
    # The state that an API tells; "" if it does not in a second: it is busy, or ends, or is not what it was.
    import re
    import socket

    end, answer = time.monotonic() + 1, b""
    try:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(1)
            stream.connect(path)
            stream.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            while len(answer) < 4096 and (left := end - time.monotonic()) > 0:
                stream.settimeout(left)
                if not (data := stream.recv(4096)):
                    break
                answer += data
    except OSError:
        pass
    found = re.search(rb'"state": *"(Not started|Running|Paused)"', answer)
    return found[1].decode().lower() if found else ""


def outputs(each: Running) -> tuple[list[str], list[str]]:
    """Paths of the files that its log and its console are written to, and what else they go to, in words."""
    found: dict[tuple[int, int], str] = {}
    others = []
    log = option(each.words, "--log-path")
    streams = [f"/proc/{each.pid}/fd/{fd}" for fd in (1, 2)]
    for path in [path_in(each.pid, log), *streams] if log else streams:
        try:
            status, shown = os.stat(path), os.readlink(path) if path in streams else path
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            found.setdefault((status.st_dev, status.st_ino), path)
        elif shown not in others:
            others.append(shown)
    return list(found.values()), others
