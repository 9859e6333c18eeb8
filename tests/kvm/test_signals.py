# SPDX-License-Identifier: Apache-2.0
"""Signals that ask for an end are never lost, whichever comes with which; ignored ones stay ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.api.oracle import PYVMM, Client, Process
from tests.kvm.guests import PATIENCE, write_guest
from tests.waiting import until
from vmm.testing import tiny_guest

# Says so, and then nothing for ever.
STUCK = "mov edx, 0x3f8; mov al, '!'; out dx, al; cli; 1: hlt; jmp 1b"
# A program of somebody else, with a thread that takes signals as gladly as the main one.
EMBEDDING = """
import signal, sys, threading, time
from vmm import Machine
vm = Machine(kernel=sys.argv[1], memory="4M", console="raw")
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: vm.stop())
signal.signal(signal.SIGCONT, lambda number, frame: None)
for _ in range(3):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
vm.start()
stop = vm.wait()
vm.close()
sys.exit(7 if stop.reason.name == "REQUESTED" else 1)
"""


def run(kernel: str, *before: str) -> list[str]:
    return [*before, sys.executable, "-m", "vmm", "run", kernel, "--memory", "4M"]


def started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    assert child.stdout.read(1) == b"!"
    return child


@pytest.mark.parametrize("pair", [(signal.SIGTERM, signal.SIGCONT), (signal.SIGHUP, signal.SIGCONT),
                                  (signal.SIGCONT, signal.SIGTERM), (signal.SIGCONT, signal.SIGINT)])  # fmt: skip
@pytest.mark.parametrize("program", ["run", "embedded"])
def test_two_signals_at_once(tmp_path: Path, program: str, pair: tuple[int, int]) -> None:
    kernel = write_guest(tmp_path, STUCK)
    if program == "embedded" and signal.SIGINT in pair:
        pair = (signal.SIGCONT, signal.SIGHUP)
    command, status = (run(kernel), 130) if program == "run" else ([sys.executable, "-c", EMBEDDING, kernel], 7)
    for _ in range(6):
        child = started(command)
        for number in pair:
            child.send_signal(number)
        assert child.wait(PATIENCE) == status
        child.communicate()


def test_stopped_and_continued_it_goes_on_and_ends_when_asked(tmp_path: Path) -> None:
    child = started(run(write_guest(tmp_path, STUCK)))
    for _ in range(20):
        child.send_signal(signal.SIGSTOP)
        child.send_signal(signal.SIGCONT)
    assert child.poll() is None
    child.send_signal(signal.SIGSTOP)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    assert child.poll() is None
    child.send_signal(signal.SIGCONT)
    assert child.wait(PATIENCE) == 130
    child.communicate()


def test_the_real_timeout(tmp_path: Path) -> None:
    command = run(write_guest(tmp_path, STUCK), "timeout", "--kill-after=30", "1")
    all_at_once = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        for _ in range(8)
    ]
    # Where it had to kill, its own status is that of a kill.
    assert [each.wait(2 * PATIENCE) for each in all_at_once] == [124] * 8


def test_the_real_nohup(tmp_path: Path) -> None:
    child = started(run(write_guest(tmp_path, STUCK), "nohup"))
    child.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE) == 130
    child.communicate()


def test_a_background_job_of_a_shell_is_not_ended_by_ctrl_c(tmp_path: Path) -> None:
    # Without job control a shell starts it with SIGINT ignored.
    child = started(["sh", "-c", 'trap "" INT; exec "$@"', "sh", *run(write_guest(tmp_path, STUCK))])
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert child.poll() is None
    child.terminate()
    assert child.wait(PATIENCE) == 130
    child.communicate()


def blocked(pid: int) -> dict[str, set[int]]:
    """Signals that each thread blocks, by the thread's name."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line)
        mask = int(lines["SigBlk"], 16)
        name = "main" if task.name == str(pid) else f"{lines['Name'].strip()} {task.name}"
        found[name] = {number for number in range(1, 32) if mask >> (number - 1) & 1}
    return found


@pytest.mark.parametrize("options", [[], ["--no-seccomp"]], ids=["seccomp", "without"])
def test_every_thread_but_the_main_one_blocks_every_signal(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "metrics").touch()
    with Process(PYVMM, tmp_path, ["--metrics-path", "metrics", *options]) as process:
        process.await_socket()
        for path, body in (
            ("/boot-source", {"kernel_image_path": write_guest(tmp_path, STUCK)}),
            ("/drives/d", {"drive_id": "d", "path_on_host": "disk", "is_root_device": False}),
            ("/vsock", {"guest_cid": 3, "uds_path": "v"}),
            ("/balloon", {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 1}),
            ("/actions", {"action_type": "InstanceStart"}),
        ):
            assert process.request("PUT", path, body).status == 204
        time.sleep(0.2)
        ours = blocked(process.process.pid)
    assert ours.pop("main") == set()
    faults = {signal.SIGSYS, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
    unblockable = {signal.SIGKILL, signal.SIGSTOP}
    assert len(ours) >= 4
    for name, mask in ours.items():
        assert mask >= set(range(1, 32)) - faults - unblockable, name


def test_asyncio_in_an_embedding_program_still_hears_of_signals(tmp_path: Path) -> None:
    program = """
import asyncio, os, signal, sys
from vmm import Machine
vm = Machine(kernel=sys.argv[1], memory="4M", console="none")
heard = []
async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: heard.append("asyncio"))
    vm.start()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    assert vm.wait(0.5) is None  # in the main thread, where it holds up the loop
    await asyncio.sleep(0.1)
    vm.stop()
    await asyncio.to_thread(vm.wait)
asyncio.run(main())
vm.close()
print(heard)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, write_guest(tmp_path, STUCK)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "['asyncio']\n", done.stderr


@pytest.mark.parametrize(
    ("number", "field", "status"),
    [
        (signal.SIGHUP, "sighup", 0), (signal.SIGXCPU, "sigxcpu", 154), (signal.SIGBUS, "sigbus", 149),
        (signal.SIGSEGV, "sigsegv", 150), (signal.SIGXFSZ, "sigxfsz", 151), (signal.SIGILL, "sigill", 157),
    ],
)  # fmt: skip
def test_the_signal_is_logged_and_counted_as_firecracker_does(
    tmp_path: Path, number: int, field: str, status: int
) -> None:
    for name in ("log", "metrics"):
        (tmp_path / name).touch()
    with Process(PYVMM, tmp_path, ["--metrics-path", "metrics", "--log-path", "log"]) as process:
        process.await_socket()
        for path, body in (
            ("/boot-source", {"kernel_image_path": write_guest(tmp_path, STUCK)}),
            ("/actions", {"action_type": "InstanceStart"}),
        ):
            assert process.request("PUT", path, body).status == 204
        os.kill(process.process.pid, signal.SIGPIPE)
        process.request("GET", "/")
        process.process.send_signal(number)
        assert process.wait(PATIENCE) == status
    log = (tmp_path / "log").read_text()
    assert "] Received signal 13, code 0.\n" in log
    assert f"] Shutting down VM after intercepting signal {int(number)}, code 0.\n" in log
    metrics = (tmp_path / "metrics").read_text().replace(" ", "")
    assert f'"{field}":1' in metrics and '"sigpipe":1' in metrics


@pytest.mark.parametrize("option", ["--config-file", "--metadata"])
def test_what_never_ends_is_not_read_on_after_a_signal(tmp_path: Path, option: str) -> None:
    os.mkfifo(tmp_path / "f")
    words = ["--api-sock", "s", option, "f"]
    process = subprocess.Popen([*PYVMM, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "f", "wb"):  # which waits until it is read
        process.terminate()
        assert process.communicate(timeout=PATIENCE)[1] == f"pyvmm serve: {option} f: Interrupted system call\n"
    assert process.returncode == 1 and not (tmp_path / "s").exists()


def test_a_log_whose_reader_went_away_holds_up_nobody(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics"
    metrics.touch()
    reader, writer = os.pipe()
    os.close(reader)
    words = ["--api-sock", "s", "--level", "Info", "--metrics-path", "metrics"]
    process = subprocess.Popen([*PYVMM, *words], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
    os.close(writer)
    try:
        until((tmp_path / "s").exists)
        client = Client(tmp_path / "s")
        assert client.request("PUT", "/mmds", b"{}").status == 204
        client.close()
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    assert '"sigpipe":0' not in metrics.read_text()


def test_a_true_fault_ends_it_with_one_line() -> None:
    program = "import ctypes; from vmm._faults import catch_faults; catch_faults(-1); ctypes.string_at(8)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (150, "pyvmm: Shutting down VM after intercepting signal 11.\n")


def test_a_true_fault_is_in_the_log_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    program = (
        "import ctypes; from vmm import _faults, logger; logger.watch(_faults.log_to); _faults.catch_faults(-1)\n"
        f"logger.configure(log_path={str(log)!r}); ctypes.string_at(8)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 150
    assert log.read_text() == done.stderr == "pyvmm: Shutting down VM after intercepting signal 11.\n"


def test_a_signal_just_before_the_start_is_an_end_as_any_other(tmp_path: Path) -> None:
    program = """
import os, signal
from vmm import launched
from vmm.commands import cli
finish_start = launched.finish_start
launched.finish_start = lambda: (finish_start(), os.kill(os.getpid(), signal.SIGTERM))
cli.entry()
"""
    command = [sys.executable, "-c", program, "run", tiny_guest(tmp_path, "again: jmp again"), "--memory", "16M"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
