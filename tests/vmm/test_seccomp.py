# SPDX-License-Identifier: Apache-2.0
"""Seccomp filters: what they allow, that every thread has its own, what a fault does; each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kvm.guests import write_guest
from vmm.jail import _seccomp
from vmm.jail import rules as seccomp_rules
from vmm.jail.rules import rules_of
from vmm.jail.seccomp import KINDS, STATUS_BAD_SYSCALL

ROOT = Path(__file__).parents[2]
NOBODYS = (
    "execve execveat fork vfork clone3 ptrace process_vm_readv process_vm_writev kill tkill mount umount2 pivot_root"
    " chroot setns bpf perf_event_open keyctl add_key request_key init_module finit_module delete_module kexec_load"
    " reboot settimeofday clock_settime iopl ioperm modify_ldt userfaultfd open_by_handle_at name_to_handle_at setuid"
    " setgid swapon swapoff acct quotactl personality pidfd_getfd pidfd_open mknod process_madvise move_mount open_tree"
).split()


def run(code: str) -> subprocess.CompletedProcess[str]:
    whole = "from vmm import threads\nfrom vmm.jail import seccomp\nimport threading, os, time\n"
    whole += f"seccomp.enable()\n{code}"
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.mark.parametrize("kind", [*KINDS, "spawn", "base"])
def test_what_no_thread_may_do(kind: str) -> None:
    marks = ("userfaultfd", ((0, 0xFFFF_FFFF, os.O_CLOEXEC | os.O_NONBLOCK | 1),))  # for faults of user mode only
    assert not {name for name, tests in rules_of(kind) if (name, tests) != marks} & set(NOBODYS)
    assert (marks in rules_of(kind)) == (kind == "base"), "where guest memory is made"


def test_filters_of_the_build_are_what_libseccomp_makes_of_the_rules() -> None:
    assert (ROOT / "vmm/jail/_seccomp_filters.h").read_text() == seccomp_rules.header()
    assert KINDS == {kind: kind in seccomp_rules.FILELESS for kind in seccomp_rules.KINDS}
    with pytest.raises(OSError, match="Invalid argument"):
        _seccomp.install("nobody")


@pytest.mark.parametrize(("whose", "status"), [("getpid", 0), ("getppid", STATUS_BAD_SYSCALL)])
def test_a_thread_signals_this_process_alone(whose: str, status: int) -> None:
    # Whose number is known when the thread gets its filter.
    code = f"import ctypes; thread = threads.spawn('blk', 'x', ctypes.CDLL(None).syscall, 234, *[os.{whose}()] * 2, 0)"
    assert run(f"{code}; thread.join()").returncode == status  # 234: tgkill


def test_a_start_compiles_no_filter() -> None:
    done = run("import sys; print(open('/proc/self/maps').read(), *sys.modules)")
    assert "/_seccomp." in done.stdout
    assert "libseccomp" not in done.stdout and "vmm.jail.rules" not in done.stdout


def test_a_balloon_of_a_copy_gives_pages_back() -> None:
    # What this takes is imported before there is a filter.
    code = """
from vmm import threads
from vmm.jail import seccomp
from vmm.memory import GuestMemory
import virtio.balloon
seccomp.guard(alone=False)
with GuestMemory(4 << 20) as memory, GuestMemory(4 << 20, pieces=memory.freeze()) as copy:
    threads.spawn("device", "balloon", copy.discard, copy.slice(1 << 20, 1 << 20)).join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_program_dropped_is_finalized_on_a_thread_without_a_filter() -> None:
    # A socket that nobody closed asks for its name when it is collected, for the warning: no filter allows that.
    code = """
import gc, socket, sys, threading
from vmm import threads
from vmm.jail import seccomp
seccomp.guard(alone=False)
made = []
class Dropped:
    def __init__(self):
        self.me, self.socket = self, socket.socket()
    def __del__(self):
        made.append(threading.current_thread().name)
def work():
    kept = [[] for _ in range(100_000)]
    gc.collect()
    print(gc.get_freeze_count(), made)
gc.collect()  # so that the next time it collects by itself is in the thread
for _ in range(4):
    Dropped()
thread = threads.spawn("vcpu", "confined", work)
thread.join()
gc.collect()
print(made)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 []", str(["MainThread"] * 4)]


def test_nothing_is_dropped_between_a_freeze_and_its_collection() -> None:
    # No other thread runs in between, not even where the program has callbacks of its own.
    code = """
import gc, os, sys, threading
from vmm import threads
from vmm.jail import seccomp
class Dropped:
    def __init__(self):
        self.me = self
    def __del__(self):
        os.access("/", os.F_OK)
def work():
    for _ in range(20_000):
        gc.collect(0)
    while len(gc.callbacks) < 3:  # each of these came while the other thread was collecting, and did nothing
        gc.collect(0)
seccomp.guard(alone=False)
gc.callbacks.append(lambda phase, info: None)
sys.setswitchinterval(1e-6)
thread = threads.spawn("vcpu", "confined", work)
while thread.is_alive():
    for _ in range(10):
        Dropped()
assert len(gc.callbacks) == 3, gc.callbacks
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [100, 1_000_000, 31_000_000])
def test_malloc_makes_its_arena_smaller(size: int) -> None:
    # It asks for the host's overcommit policy before it first does, and what was freed before says when that is.
    code = f"""
import ctypes
from vmm import threads
from vmm.jail import seccomp
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def work():
    blocks = [libc.malloc(100 << 10) for _ in range(600)]
    while blocks:
        libc.free(blocks.pop())
libc.free(libc.malloc({size}))
seccomp.guard(alone=False)
threads.spawn("vcpu", "confined", work).join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_threads_are_made_by_one_that_may_do_what_each_of_them_may() -> None:
    made = set(rules_of("spawn"))
    whole = {name for name, tests in made if not tests}
    for kind in set(KINDS) - {"resolver"}:  # which is made where there is no filter
        assert {rule for rule in rules_of(kind) if rule[0] not in whole} <= made, kind


@pytest.mark.parametrize("kind", [*KINDS])
def test_every_kind_of_thread_lives_and_ends(kind: str) -> None:
    code = f"""
def work(*sizes):
    for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20, *sizes):
        blocks = [bytearray(size) for _ in range(4)]
        del blocks
    time.sleep(0.001)
    print("stat", os.stat in (None,), time.time() > 0, len(os.getrandom(8)))
    try:
        raise ValueError("caught")
    except ValueError as error:
        print(error)
def large():
    work(1 << 24)
for _ in range(5):
    thread = threads.spawn({kind!r}, "worker", large)
    thread.join()
every = [threads.spawn({kind!r}, "worker", target) for target in [large] * 4 + [work] * 16]
for thread in every:
    thread.join()
print("all ended")
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "all ended"


def test_a_fault_names_the_thread_and_the_system_call() -> None:
    done = run("threads.spawn('blk', 'x', lambda: os.open('/etc/hosts', os.O_RDONLY)); time.sleep(20)")
    assert done.returncode == STATUS_BAD_SYSCALL
    assert done.stderr.startswith("pyvmm: seccomp: a thread of kind blk made the forbidden system call openat (257), ")


def test_a_thread_may_make_threads_of_another_kind_and_not_by_itself() -> None:
    code = """
def outer():
    threads.spawn("fs", "inner", lambda: print(len(os.listdir("."))  > 0)).join()
    print("made", flush=True)
    threading.Thread(target=print).start()
threads.spawn("vcpu", "outer", outer).join()
time.sleep(20)
"""
    done = run(code)
    assert done.stdout.splitlines() == ["True", "made"]
    assert done.returncode in (STATUS_BAD_SYSCALL, -31), "glibc has blocked even SIGSYS where it makes a thread"


def test_a_thread_for_which_there_is_no_memory_is_refused() -> None:
    done = run("""
class Poor(threading.Thread):
    def start(self):
        raise MemoryError

for _ in range(2):  # and the one that makes threads lives
    try:
        threads.guard.start(Poor())
    except MemoryError:
        print("refused")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n" * 2, "")


def test_filters_only_take_away() -> None:
    done = run("threads.enter('vcpu'); threads.enter('base'); print(1); os.open('/etc/hosts', os.O_RDONLY)")
    assert done.returncode in (STATUS_BAD_SYSCALL, 1), done


def test_a_signal_is_not_masked_in_the_main_thread_and_is_in_the_others() -> None:
    code = """
import signal
masks = []
threads.spawn("fs", "x", lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))).join()
assert signal.SIGTERM in masks[0] and signal.SIGSYS not in masks[0], masks
assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_filter_language_is_refused() -> None:
    line = [sys.executable, "-m", "vmm", "serve", "--seccomp-filter", "f.bpf"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 153
    assert done.stderr.startswith("pyvmm serve: --seccomp-filter f.bpf: is for Firecracker's threads")


NO_ROOM = """
import errno
from vmm.jail import _seccomp
def fails(*how): raise OSError(errno.EMFILE, "no descriptor left")
_seccomp.confine = fails
"""


def test_a_vcpu_that_cannot_be_confined_ends_its_machine(tmp_path: Path) -> None:
    code = f"""{NO_ROOM}
from vmm import Machine, undertaker
from vmm.errors import HostError
vm = Machine({write_guest(tmp_path, "1: hlt; jmp 1b")!r}, memory="4M", console="none")
vm.start()
try:
    vm.wait(30)
except HostError as error:
    print(error)
vm.close()
undertaker.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("confine a thread of kind vcpu: Too many open files\n", "")


def test_another_thread_that_cannot_be_confined_is_one_line() -> None:
    done = run(f"{NO_ROOM}\nthreads.spawn('console', 'console out', lambda: print('ran')).join()")
    told = "pyvmm: console out: confine a thread of kind console: Too many open files\n"
    assert (done.stdout, done.stderr) == ("", told)


def test_without_a_thread_descriptors_are_closed_at_once() -> None:
    code = """
def fails(thread): raise RuntimeError("can't start new thread")
threads.guard.start = fails
from vmm import undertaker
out, into = os.pipe()
undertaker.bury(into)
assert os.read(out, 1) == b""
undertaker.wait()
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_such_system_call_is_an_error() -> None:
    with pytest.raises(ValueError, match="teleport"):
        seccomp_rules.Compiler().compile([("teleport", ())])


def test_numbers_of_ioctls_are_those_of_who_uses_them() -> None:
    from vmm.kvm import _state as _kvm_state

    assert set(seccomp_rules._KVM_READS) == set(_kvm_state.READS)


def test_a_fault_is_in_the_log_too(tmp_path: Path) -> None:
    # Of a daemon, whose stderr is nowhere, that is all there is.
    log = tmp_path / "log"
    log.touch()
    done = run(
        f"from vmm import logger; logger.configure(log_path={str(log)!r})\n"
        "threads.spawn('blk', 'x', lambda: os.open('/etc/hosts', os.O_RDONLY)); time.sleep(20)"
    )
    assert done.returncode == STATUS_BAD_SYSCALL
    assert log.read_text() == done.stderr != ""
