# SPDX-License-Identifier: Apache-2.0
"""Every command on a terminal, behind its filters: in front, in the background, hung up, in a pid namespace."""

from __future__ import annotations

import os
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jail.jailed import Jailed
from tests.jail.terminal import Terminal
from tests.kvm.guests import write_guest
from tests.waiting import has_ended, until
from vmm.errors import ConfigError
from vmm.kvm.vm import Kvm

# Says "!" and presses the reset key; the other asks for a key first, says it, and so on.
BRIEF = "mov edx, 0x3f8; mov al, '!'; out dx, al; mov al, 0xfe; out 0x64, al; 1: hlt; jmp 1b"
ECHO = """
    mov edx, 0x3f8; mov al, '!'; out dx, al
1:  mov edx, 0x3fd; in al, dx; test al, 1; je 1b
    mov edx, 0x3f8; in al, dx; out dx, al
    cmp al, 'q'; jne 1b
    mov al, 0xfe; out 0x64, al
2:  hlt; jmp 2b
"""
# The statuses of a guest that resets itself.
STATUS = {"run": 80, "serve": 0, "jailer": 0}
COMMANDS = tuple(STATUS)


@pytest.fixture(autouse=True)
def _layers() -> None:
    if os.geteuid():
        pytest.skip("LAYER MISSING: jail: needs root")
    try:
        Kvm().close()
    except ConfigError as error:
        pytest.skip(f"LAYER MISSING: kvm: {error}")


class Place:
    """Where guests are put and commands made."""

    def __init__(self, base: Path) -> None:
        self.jail = Jailed(base)
        self.terminals: list[Terminal] = []

    def command(self, name: str, source: str, *options: str) -> list[str]:
        """The command line that runs that guest."""
        kernel = write_guest(self.jail.base, source)
        self.jail.put("kernel", Path(kernel))
        if name == "run":
            return [sys.executable, "-m", "vmm", "run", kernel, "--memory", "4M"]
        where = "/kernel" if name == "jailer" else kernel
        vmm = self.jail.configure(
            boot_source={"kernel_image_path": where, "boot_args": ""}, drives=[],
            machine_config={"vcpu_count": 1, "mem_size_mib": 4},
        )  # fmt: skip
        if name == "jailer":
            return self.jail.command(*options, vmm=(*vmm, "--no-api"))
        file = str(self.jail.root / "config.json")
        return [sys.executable, "-m", "vmm", "serve", "--no-api", "--config-file", file]

    def on_terminal(self, how: str, command: list[str]) -> Terminal:
        """Run it by the shell."""
        self.terminals.append(Terminal(how, command))
        return self.terminals[-1]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for terminal in place.terminals:
        terminal.close()
    place.jail.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_in_front_it_has_the_keys(place: Place, command: str) -> None:
    terminal = place.on_terminal("fg", place.command(command, ECHO))
    terminal.hear(b"!")
    assert termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO) == 0
    os.write(terminal.master, b"aq")
    terminal.hear(b"aq")
    assert terminal.end() == STATUS[command], terminal.heard
    assert termios.tcgetattr(terminal.slave) == terminal.before


@pytest.mark.parametrize("command", COMMANDS)
def test_in_the_background_a_server_goes_on_and_run_is_stopped_until_it_is_in_front(place: Place, command: str) -> None:
    terminal = place.on_terminal("bg", place.command(command, BRIEF))
    terminal.hear(b"!")
    assert terminal.end() == STATUS[command], terminal.heard
    assert (b"stopped" in terminal.heard) == (command == "run")
    assert termios.tcgetattr(terminal.slave) == terminal.before


@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_and_continued_behind_and_then_in_front(place: Place, command: str) -> None:
    terminal = place.on_terminal("fg", place.command(command, ECHO))
    terminal.hear(b"!")
    terminal.shell.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    os.write(terminal.master, b"abc")
    time.sleep(0.3)
    assert terminal.shell.poll() is None and b"stopped" not in terminal.heard
    terminal.shell.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    os.write(terminal.master, b"q\n")
    terminal.hear(b"q")
    assert terminal.end() == STATUS[command], terminal.heard


@pytest.mark.parametrize("command", COMMANDS)
def test_hung_up_it_ends(place: Place, command: str) -> None:
    terminal = place.on_terminal("fg", place.command(command, ECHO))
    terminal.hear(b"!")
    job = terminal.job()
    terminal.hang_up()
    until(lambda: has_ended(job))


@pytest.mark.parametrize("command", COMMANDS)
def test_hung_up_and_told_to_ignore_that_it_goes_on_without_its_terminal(place: Place, command: str) -> None:
    terminal = place.on_terminal("nohup", place.command(command, ECHO))
    terminal.hear(b"!")
    job = terminal.job()
    terminal.hang_up()
    time.sleep(0.3)
    before = _cpu_of_others(job)
    time.sleep(0.3)
    assert terminal.shell.poll() is None
    assert _cpu_of_others(job) - before < 10, "a thread spins on the terminal that is gone"
    os.kill(job, signal.SIGTERM)
    assert terminal.end() in (0, 130)


def _cpu_of_others(pid: int) -> int:
    # Ticks of all threads but the vCPU's, whose guest polls.
    ticks = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, _, rest = (task / "stat").read_text().rpartition(")")
        if "vcpu" not in name:
            ticks += sum(map(int, rest.split()[11:13]))
    return ticks


# Its process group, and the terminal's, are outside and without a number.
@pytest.mark.parametrize("how", ["fg", "bg"])
@pytest.mark.parametrize("command", ["run", "serve"])
def test_in_a_pid_namespace(place: Place, command: str, how: str) -> None:
    terminal = place.on_terminal(how, ["unshare", "--pid", "--fork", *place.command(command, BRIEF)])
    terminal.hear(b"!")
    assert terminal.end() == STATUS[command], terminal.heard


# The jailer itself ends at once: what it leaves is nobody's child, and in the background.
@pytest.mark.parametrize("how", ["stay", "bg"])
def test_a_jail_with_a_pid_namespace(place: Place, how: str) -> None:
    terminal = place.on_terminal(how, place.command("jailer", BRIEF, "--new-pid-ns"))
    terminal.hear(b"!")
    until(lambda: not Path(f"/proc/{place.jail.pid}").exists())
