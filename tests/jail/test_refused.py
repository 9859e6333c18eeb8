# SPDX-License-Identifier: Apache-2.0
"""What a VMM cannot do to its host once it is in its jail: each thing is tried from inside, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jail import inside
from vmm.seccomp import STATUS_BAD_SYSCALL

ROOT = Path(__file__).parents[2]
# What the jail alone does not refuse, and need not where seccomp does: it harms the jail's own process at most, or
# reaches a network namespace that is the jail's if --netns makes it so.
SECCOMP_ALONE = {
    "unshare a user namespace", "execve from memory", "execve", "fork", "vfork", "clone a process", "executable memory",
    "socket(AF_INET)", "socket(AF_NETLINK)", "socket(AF_VSOCK)", "keyctl", "add_key", "io_uring_setup", "userfaultfd",
    "kill everybody", "kill the parent", "pidfd_open", "link out of the tree", "setuid(0)", "setgroups", "capset",
    "limits of the parent", "perf_event_open", "bpf", "syslog", "unshare a mount namespace", "type into a terminal",
}  # fmt: skip
REFUSED = {"EPERM", "EACCES", "ENOENT", "ETXTBSY", "ENOSYS"}


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid():
        pytest.skip("LAYER MISSING: jail: needs root")


def attempt(base: Path, uid: int, kind: str, name: str) -> tuple[int, str, str]:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests/jail/inside.py"), str(base), str(uid), kind, name],
        capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return ended.returncode, ended.stdout.strip(), ended.stderr.strip()


@pytest.mark.parametrize("name", inside.ATTEMPTS)
def test_a_thread_behind_its_filter_is_refused(tmp_path: Path, name: str) -> None:
    status, said, told = attempt(tmp_path, 1234, "net" if name == "io_uring_setup" else "fs", name)
    if status == STATUS_BAD_SYSCALL:
        assert told.startswith("pyvmm: seccomp: a thread of kind "), told
        assert not said
    else:
        assert status == 1 and said in REFUSED, (status, said, told)


@pytest.mark.parametrize("uid", [0, 1234])
@pytest.mark.parametrize("name", [name for name in inside.ATTEMPTS if name not in SECCOMP_ALONE])
def test_the_jail_alone_refuses(tmp_path: Path, name: str, uid: int) -> None:
    status, said, told = attempt(tmp_path, uid, "none", name)
    assert status == 1 and said in REFUSED, (status, said, told)


def test_the_trap_names_thread_and_system_call(tmp_path: Path) -> None:
    status, _, told = attempt(tmp_path, 1234, "blk", "socket(AF_INET)")
    assert status == STATUS_BAD_SYSCALL
    assert told == (
        "pyvmm: seccomp: a thread of kind blk made the forbidden system call socket (41), arguments 0x2, 0x1, 0x0"
    )
