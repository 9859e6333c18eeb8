# SPDX-License-Identifier: Apache-2.0
"""Which threads of a program that embeds us have a filter: ours, and none that runs code of the program's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.kvm.guests import run, write_guest
from vmm import Exit, Machine, threads
from vmm.jail.seccomp import STATUS_BAD_SYSCALL

ROOT = Path(__file__).parents[2]
# Asks port 0x510 for a byte, and ends.
ASK = "mov dx, 0x510; in al, dx; mov dx, 0xf4; out dx, al; hlt"
WAIT = "mov dx, 0x3f8; mov al, 'x'; out dx, al; again: jmp again"


def _field(tid: int, field: str) -> int:
    text = Path(f"/proc/self/task/{tid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field)))


def _modes(settings: str, count: int = 1) -> dict[str, str]:
    """In a program of its own: the seccomp mode of each thread by its name, of a machine that runs."""
    code = f"""
import os, sys, threading, time
from vmm import Machine
{settings}
with Machine(kernel=sys.argv[1], memory="4M", console="none", entropy=True, **OPTIONS) as vm:
    said = threading.Event()
    vm.on_console(lambda data: said.set())
    vm.start()
    assert said.wait(30)
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{{task}}/status") as file:
            words = dict(line.split(":", 1) for line in file)
        print(words["Name"].strip() if int(task) != os.getpid() else "main", words["Seccomp"].strip(), sep="=")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, os.environ["PYVMM_TEST_GUEST"]],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(line.split("=") for line in done.stdout.splitlines())


@pytest.fixture(autouse=True)
def _guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_TEST_GUEST", write_guest(tmp_path, WAIT))


def test_threads_of_ours_have_filters_and_the_programs_own_have_none() -> None:
    modes = _modes("OPTIONS = {}")
    assert modes["fc_vcpu 0"] == "2"
    assert modes["main"] == "0"


@pytest.mark.parametrize(
    "settings",
    [
        "OPTIONS = {'seccomp': False}",
        "OPTIONS = {}; threading.settrace(lambda *words: None)",
        "OPTIONS = {}; threading.setprofile(lambda *words: None)",
        "from virtio.device import VirtioDevice\nclass Own(VirtioDevice):\n  device_type = 42; queue_sizes = (8,)\n"
        "OPTIONS = {'devices': [Own()]}",
    ],
    ids=["off", "debugger", "profiler", "device"],
)
def test_a_vcpu_that_runs_code_of_the_programs_has_none(settings: str) -> None:
    assert _modes(settings)["fc_vcpu 0"] == "0"


class Asked:
    """A port of the program's, which does what no filter allows."""

    def read(self, offset: int, data: memoryview) -> None:
        self.read_file = Path("/proc/self/comm").read_text()

    def write(self, offset: int, data: memoryview) -> None: ...


def test_a_port_of_the_programs_opens_a_file(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []

    def on_exit(stop: Exit) -> None:
        told.append((_field(threading.get_native_id(), "Seccomp:"), Path("/proc/self/comm").read_text()))

    port = Asked()
    with Machine(kernel=write_guest(tmp_path, ASK), memory="4M", console="none", exit_port=0xF4) as vm:
        vm.pio.add(0x510, 1, port, "asked")
        vm.on_exit(on_exit)
        run(vm)
    assert port.read_file
    assert [mode for mode, _ in told] == [0]


def test_a_callback_for_the_end_opens_a_file(tmp_path: Path) -> None:
    # The vCPU that ends the machine is behind its filter.
    told = []
    with Machine(kernel=write_guest(tmp_path, "mov dx, 0xf4; out dx, al; hlt"), memory="4M", console="none",
                 exit_port=0xF4) as vm:  # fmt: skip
        vm.on_exit(lambda stop: told.append(Path("/proc/self/comm").read_text()))
        run(vm)
        assert len(told) == 1, "before wait() returns"
    assert threads.guard is not None and not threads.guard.alone


def test_a_forked_child_makes_machines_too(tmp_path: Path) -> None:
    kernel = write_guest(tmp_path, "mov dx, 0xf4; out dx, al; hlt")
    settings = {"kernel": kernel, "memory": "4M", "console": "none", "exit_port": 0xF4, "entropy": True}
    with Machine(**settings) as vm:  # type: ignore[arg-type]
        run(vm)
    child = os.fork()
    if child == 0:
        with Machine(**settings) as vm:  # type: ignore[arg-type]
            run(vm)
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("option", ["", "--no-seccomp"])
def test_run_has_a_filter_on_every_thread_but_by_that_word(tmp_path: Path, option: str) -> None:
    words = [
        sys.executable,
        "-m",
        "vmm",
        "run",
        write_guest(tmp_path, WAIT),
        "--memory",
        "4M",
        "--rng",
        *option.split(),
    ]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=ROOT) as vmm:
        try:
            assert vmm.stdout is not None and vmm.stdout.read(1) == b"x"
            threading.Event().wait(0)
            for _ in range(2000):  # the main thread puts its own on once the vCPU runs
                tasks = Path(f"/proc/{vmm.pid}/task").iterdir()
                modes = {line for task in tasks for line in (task / "status").read_text().splitlines() if "mp:" in line}
                if modes == {f"Seccomp:\t{0 if option else 2}"}:
                    break
            assert modes == {f"Seccomp:\t{0 if option else 2}"}
        finally:
            vmm.terminate()
    assert vmm.returncode != STATUS_BAD_SYSCALL
