# SPDX-License-Identifier: Apache-2.0
"""What a VMM cannot do to its host once it is in its jail: each thing is tried from inside, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jail import inside
from vmm.jail.seccomp import KINDS, STATUS_BAD_SYSCALL

ROOT = Path(__file__).parents[2]
KINDS_TRIED = (*KINDS, "spawn", "base")
# Extension modules of devices are imported behind it, and memory is loaded; no guest runs yet.
ALLOWED = {("base", "executable memory"), ("base", "userfaultfd by its device")}
Told = dict[str, list[Any]]
# What the jail alone does not refuse, and need not where seccomp does: it harms the jail's own process at most, or
# reaches a network namespace that is the jail's if --netns makes it so.
SECCOMP_ALONE = {
    "unshare a user namespace", "execve from memory", "execve", "fork", "vfork", "clone a process", "executable memory",
    "socket(AF_INET)", "socket(AF_NETLINK)", "socket(AF_VSOCK)", "keyctl", "add_key", "io_uring_setup", "userfaultfd",
    "userfaultfd by its device",
    "kill everybody", "kill the parent", "pidfd_open", "link out of the tree", "setuid(0)", "setgroups", "capset",
    "limits of the parent", "perf_event_open", "bpf", "syslog", "unshare a mount namespace", "type into a terminal",
    "openat by a new ring", "socket(AF_INET) by a new ring", "io_uring_register",
}  # fmt: skip
REFUSED = {"EPERM", "EACCES", "ENOENT", "ETXTBSY", "ENOSYS"}


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid():
        pytest.skip("LAYER MISSING: jail: needs root")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Told]:
    """What came of all attempts of a kind of thread."""
    known: dict[tuple[int, str], Told] = {}

    def ask(uid: int, kind: str) -> Told:
        if (uid, kind) not in known:
            base = str(tmp_path_factory.mktemp("jail"))
            ended = subprocess.run(
                [sys.executable, str(ROOT / "tests/jail/inside.py"), base, str(uid), kind, *inside.ATTEMPTS],
                capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            assert ended.returncode == 0, ended
            known[uid, kind] = json.loads(ended.stdout)
        return known[uid, kind]

    return ask


@pytest.mark.parametrize("kind", KINDS_TRIED)
@pytest.mark.parametrize("name", inside.ATTEMPTS)
def test_a_thread_behind_its_filter_is_refused(tried: Callable[[int, str], Told], name: str, kind: str) -> None:
    if (kind, name) in ALLOWED:
        return
    status, said, told = tried(1234, kind)[name]
    if status == STATUS_BAD_SYSCALL:
        assert told.startswith("pyvmm: seccomp: a thread of kind "), told
        assert not said
    else:
        assert status == 1 and said in REFUSED, (status, said, told)


@pytest.mark.parametrize("uid", [0, 1234])
@pytest.mark.parametrize("name", [name for name in inside.ATTEMPTS if name not in SECCOMP_ALONE])
def test_the_jail_alone_refuses(tried: Callable[[int, str], Told], name: str, uid: int) -> None:
    status, said, told = tried(uid, "none")[name]
    assert status == 1 and said in REFUSED, (status, said, told)


def test_a_ring_without_restrictions_does_what_a_filter_forbids(tried: Callable[[int, str], Told]) -> None:
    # So that the refusals above are of the restrictions, and not of a submission that is wrong.
    for name in ("openat by a new ring", "socket(AF_INET) by a new ring"):
        assert tried(1234, "none")[name][:2] == [0, "done"], name
    assert tried(1234, "blk-uring")["openat by a disk's ring"][:2] == [1, "EACCES"]
    assert tried(1234, "blk-uring")["socket(AF_INET) by a disk's ring"][:2] == [1, "EACCES"]


def test_the_trap_names_thread_and_system_call(tried: Callable[[int, str], Told]) -> None:
    status, _, told = tried(1234, "blk")["socket(AF_INET)"]
    assert status == STATUS_BAD_SYSCALL
    assert told == (
        "pyvmm: seccomp: a thread of kind blk made the forbidden system call socket (41), arguments 0x2, 0x1, 0x0"
    )
