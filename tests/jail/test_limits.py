# SPDX-License-Identifier: Apache-2.0
"""A limit on the size of files: guest RAM is not counted, and files stop growing there without harm to the VM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jail.jailed import ROOT, Jailed
from tests.kvm.guests import write_guest
from tests.waiting import PATIENCE, until
from vmm.errors import ConfigError
from vmm.kvm.vm import Kvm

LIMIT = 8192
IDLE = "1: hlt; jmp 1b"
# 16 KiB to the serial port, and the reset key.
TALK = """
    mov ecx, 16384
1:  mov edx, 0x3fd; in al, dx; test al, 0x20; je 1b
    mov edx, 0x3f8; mov al, 'x'; out dx, al
    dec ecx; jne 1b
    mov al, 0xfe; out 0x64, al
2:  hlt; jmp 2b
"""


@pytest.fixture(autouse=True)
def _layers() -> None:
    if os.geteuid():
        pytest.skip("LAYER MISSING: jail: needs root")
    try:
        Kvm().close()
    except ConfigError as error:
        pytest.skip(f"LAYER MISSING: kvm: {error}")


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jailed]:
    jailed = Jailed(tmp_path)
    yield jailed
    jailed.close()


def test_a_jail_with_a_limit_starts_and_outlives_its_log(jail: Jailed) -> None:
    jail.put("kernel", Path(write_guest(jail.base, IDLE)))
    for name in ("log", "metrics"):
        jail.put(name, b"")
    vmm = jail.configure(
        boot_source={"kernel_image_path": "/kernel", "boot_args": ""}, drives=[],
        machine_config={"vcpu_count": 1, "mem_size_mib": 64},
        logger={"log_path": "/log", "level": "Debug"}, metrics={"metrics_path": "/metrics"},
    )  # fmt: skip
    jail.start(f"--resource-limit=fsize={LIMIT}", vmm=vmm)
    until(lambda: jail.request("GET", "/")[1]["state"] == "Running")
    while (jail.root / "log").stat().st_size < LIMIT:
        jail.request("GET", "/")
    flush = {"action_type": "FlushMetrics"}
    answers = [jail.request("PUT", "/actions", flush)[0] for _ in range(6)]
    assert (answers[0], answers[-1]) == (204, 400), answers
    assert (jail.root / "metrics").stat().st_size == LIMIT
    assert jail.request("GET", "/")[1]["state"] == "Running"
    os.kill(jail.pid, signal.SIGTERM)
    jail.end()


def test_run_under_ulimit_ends_as_the_guest_wants_it(tmp_path: Path) -> None:
    console = tmp_path / "console"
    command = [sys.executable, "-m", "vmm", "run", write_guest(tmp_path, TALK), "--memory", "64M"]
    script = f'ulimit -f {LIMIT // 1024}; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command, "--console", f"file:{console}"],
        capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 80, done
    assert console.read_bytes() == b"x" * LIMIT
    assert "8192 bytes of the console's output are lost: File too large" in done.stderr
