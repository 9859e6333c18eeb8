# SPDX-License-Identifier: Apache-2.0
"""pyvmm attach: on a terminal, in a pipe, and every way out of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.api.oracle import Process
from tests.jail.jailed import Jailed
from tests.jail.terminal import Terminal
from tests.waiting import PATIENCE, until
from vmm.testing import tiny_guest

PYVMM = str(Path(sys.executable).with_name("pyvmm"))
WORD = f"echo{os.getpid()}"  # other VMs may run here
# Says "up"; then what it hears with bit 5 turned, and ends at a q by exit port 5.
ECHO = """
    mov dx, 0x3f8; mov al, 'u'; out dx, al; mov al, 'p'; out dx, al
again:
    mov dx, 0x3fd; in al, dx; test al, 1; jz again
    mov dx, 0x3f8; in al, dx; cmp al, 'q'; je quit
    xor al, 0x20; out dx, al; jmp again
quit:
    mov al, 5; out 0xf4, al
"""
Attach = Callable[..., Terminal]


class Vm:
    """`pyvmm run` of that guest, with its console on a socket."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "console"
        words = [PYVMM, "run", tiny_guest(directory, ECHO, WORD), "--memory", "16M", "--console", "unix:console"]
        self.process = subprocess.Popen(words, cwd=directory, stdin=subprocess.DEVNULL, stderr=PIPE)
        until(lambda: self.path.exists() or self.process.poll() is not None)


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    vm = Vm(tmp_path)
    yield vm
    vm.process.kill()
    vm.process.communicate()


@pytest.fixture
def attach() -> Iterator[Attach]:
    """pyvmm attach on a terminal, once it is there."""
    terminals = []

    def begin(name: str = WORD, how: str = "fg") -> Terminal:
        terminals.append(Terminal(how, [PYVMM, "attach", name]))
        terminals[-1].hear(f"pyvmm attach: {name}: press Ctrl-] to leave\r\n".encode())
        until(lambda: termios.tcgetattr(terminals[-1].slave) != terminals[-1].before)
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.close()


def left(terminal: Terminal, says: bytes, status: int = 0) -> None:
    """It ends with these words, and the terminal is as it was before."""
    assert terminal.end() == status, terminal.heard
    terminal.hear(says)
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert b"Traceback" not in terminal.heard


def test_every_key_is_the_guests_but_one(vm: Vm, attach: Attach) -> None:
    terminal = attach()
    terminal.hear(b"up")
    os.write(terminal.master, b"abC\x03\x1a\x1c")
    terminal.hear(b"ABc#:<")
    heard = b""
    for _ in range(20):  # the guest's answer is nobody's if it comes between the first one's last look and its end
        os.write(terminal.master, b"d\x1de")
        left(terminal, f"\r\npyvmm attach: {WORD}: left\r\n".encode())
        again = attach(str(vm.path))  # by the socket this time
        os.write(again.master, b"x")
        again.hear(b"X")
        assert b"up" not in again.heard and b"E" not in again.heard
        heard += terminal.heard + again.heard
        if b"D" in heard:
            return
        terminal = attach()
    pytest.fail(f"the key before Ctrl-] is not the guest's: {heard!r}")


def test_the_vm_ends(vm: Vm, attach: Attach) -> None:
    terminal = attach(str(vm.process.pid))
    terminal.hear(b"up")
    os.write(terminal.master, b"q")
    left(terminal, f"pyvmm attach: {vm.process.pid}: the VM has ended".encode())
    assert vm.process.wait() == 5 and not vm.path.exists()


def test_the_vm_is_killed(vm: Vm, attach: Attach) -> None:
    terminal = attach()
    vm.process.kill()
    left(terminal, b": the VM has ended")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_gives_the_terminal_back(vm: Vm, attach: Attach, number: signal.Signals) -> None:
    terminal = attach()
    os.kill(terminal.job(), number)
    left(terminal, b"", 128 + number)
    assert vm.process.poll() is None


def test_continued_it_is_raw_again(vm: Vm, attach: Attach) -> None:
    terminal = attach()
    raw = termios.tcgetattr(terminal.slave)
    job = terminal.job()
    termios.tcsetattr(terminal.slave, termios.TCSANOW, terminal.before)  # as a shell does while it is stopped
    os.kill(job, signal.SIGCONT)
    until(lambda: termios.tcgetattr(terminal.slave) == raw)


def test_hung_up_it_ends(vm: Vm, attach: Attach) -> None:
    terminal = attach()
    job = terminal.job()
    terminal.hang_up()
    until(lambda: not Path(f"/proc/{job}").exists() or terminal.shell.poll() is not None)
    assert vm.process.poll() is None


def test_another_client_takes_the_console(vm: Vm, attach: Attach) -> None:
    first = attach()
    second = attach()
    left(first, b": another client has taken the console", 1)
    os.write(second.master, b"x")
    second.hear(b"X")


def test_in_a_pipe_bytes_are_bytes(vm: Vm) -> None:
    command = [PYVMM, "attach", WORD]
    typed = bytes(byte for byte in range(256) if byte != ord("q"))
    done = subprocess.run(command, input=typed + b"q", capture_output=True, timeout=60)
    assert done.stdout == b"up" + bytes(byte ^ 0x20 for byte in typed)
    assert (done.returncode, done.stderr) == (0, f"pyvmm attach: {WORD}: the VM has ended\n".encode())


def test_a_guest_that_hears_nothing_can_be_left(tmp_path: Path, attach: Attach) -> None:
    guest = tiny_guest(tmp_path, "again: jmp again", WORD)
    words = [PYVMM, "run", guest, "--memory", "16M", "--console", f"unix:{tmp_path}/console"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
        try:
            until((tmp_path / "console").exists)
            terminal = attach(f"{tmp_path}/console")
            for _ in range(100):  # more than all that is between this terminal and the guest
                os.write(terminal.master, b"x" * 4000)
            os.write(terminal.master, b"\x1d")
            left(terminal, b": left")
        finally:
            process.kill()


def refusal(*words: str) -> str:
    """The one line that it refuses with."""
    done = subprocess.run([PYVMM, "attach", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    return done.stderr


def test_a_vm_without_such_a_console(tmp_path: Path) -> None:
    guest = tiny_guest(tmp_path, "again: jmp again", WORD)
    with subprocess.Popen([PYVMM, "run", guest, "--memory", "16M", "--console", "none"]) as process:
        try:
            until(lambda: subprocess.run([PYVMM, "ps"], capture_output=True, text=True).stdout.count(WORD))
            problem = "has no console to attach to; start it with: pyvmm run --console unix:PATH"
            assert refusal(WORD) == f"pyvmm attach: NAME {WORD}: {problem}\n"
        finally:
            process.kill()


def test_a_path_where_nothing_is(tmp_path: Path) -> None:
    assert "is not there; it is the PATH of a running VM's --console unix:PATH" in refusal(f"{tmp_path}/no")
    done = subprocess.run([PYVMM, "attach", __file__], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == f"pyvmm attach: connect to {__file__}: Connection refused\n"


def test_a_program_with_two(tmp_path: Path) -> None:
    program = tmp_path / f"{WORD}.py"
    program.write_text(f"""
from vmm import Machine
guest = {tiny_guest(tmp_path, ECHO)!r}
with Machine(guest, memory="16M", console="unix:{tmp_path}/a") as one:
    one.start()
    with Machine(guest, memory="16M", console="unix:{tmp_path}/b") as two:
        two.start()
        print("up", flush=True)
        input()
    print("one", flush=True)
    one.wait()
""")
    with subprocess.Popen([sys.executable, program], stdin=PIPE, stdout=PIPE, bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        paths = [f"/proc/{process.pid}/root{tmp_path}/{name}" for name in "ab"]
        assert f"has 2 consoles; give the path of one: {', '.join(paths)}\n" in refusal(program.name)
        process.stdin.write(b"\n")
        assert process.stdout.readline() == b"one\n"
        done = subprocess.run([PYVMM, "attach", program.name], input=b"xq", capture_output=True, timeout=60)
        assert (done.stdout, done.stderr) == (b"upX", f"pyvmm attach: {program.name}: the VM has ended\n".encode())


def test_a_served_vm_without_one(tmp_path: Path) -> None:
    (tmp_path / "vm.json").write_text(json.dumps({"boot-source": {"kernel_image_path": tiny_guest(tmp_path, ECHO)}}))
    with Process([PYVMM, "serve", "--id", WORD], tmp_path, ["--config-file", "vm.json"]) as process:
        process.await_socket()
        assert 'its --config-file gives it one: "pyvmm": {"console": "unix:PATH"}\n' in refusal(WORD)


def test_into_a_jail(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("LAYER MISSING: jail: needs root")
    jail = Jailed(tmp_path / ("long" * 20))  # no address of a socket is as long as this path
    jail.put("kernel", Path(tiny_guest(tmp_path, ECHO)))
    jail.put("run/none", b"")
    ours = {"console": "unix:/run/console", "exit_port": 0xF4}
    jail.start(vmm=("--no-api", *jail.configure(boot_source={"kernel_image_path": "/kernel"}, pyvmm=ours)))
    assert jail.process is not None
    try:
        until((jail.root / "run/console").exists)
        done = subprocess.run([PYVMM, "attach", str(jail.process.pid)], input=b"xq", capture_output=True, timeout=60)
        assert (done.stdout, done.returncode) == (b"upX", 0), done
        assert jail.process.wait(PATIENCE) == 5
        assert not (jail.root / "run/console").exists()
    finally:
        jail.close()


def test_a_served_vm(tmp_path: Path) -> None:
    guest = tiny_guest(tmp_path, ECHO)
    ours = {"console": "unix:console", "exit_port": 0xF4}
    (tmp_path / "vm.json").write_text(json.dumps({"boot-source": {"kernel_image_path": guest}, "pyvmm": ours}))
    with Process([PYVMM, "serve", "--id", WORD], tmp_path, ["--config-file", "vm.json"]) as process:
        process.await_socket()
        until((tmp_path / "console").exists)  # the socket of the API is there first
        done = subprocess.run([PYVMM, "attach", WORD], input=b"xq", capture_output=True, timeout=60)
        assert (done.stdout, done.returncode) == (b"upX", 0)
        assert process.process.wait() == 5
