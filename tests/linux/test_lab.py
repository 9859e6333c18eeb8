# SPDX-License-Identifier: Apache-2.0
"""The lab's machine itself, in one boot."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from vmm import lab
from vmm.kvm.vm import runs_linux

# On standard error facts, on standard output what came in.
SCRIPT = r"""
pwd >/dev/stderr
cat
cat /dev/stdin
echo kept >"$1/by the command"
echo lost >"$2/by the command" && echo "overlay=ok" >&2
[ -e "$(dirname "$1")/not named" ] || echo "hidden=ok" >&2
[ -s /etc/shadow ] || echo "shadow=hidden" >&2
grep -qw memory /sys/fs/cgroup/cgroup.controllers && mkdir /sys/fs/cgroup/x && echo "cgroup2=ok" >&2
modprobe br_netfilter && [ -d /sys/module/bridge ] && echo "modprobe=ok" >&2
grep -cw -e avx -e avx2 -e xsave /proc/cpuinfo >/dev/null || echo "avx=none" >&2
[ -c /dev/kvm ] && [ -c /dev/net/tun ] && echo "devices=ok" >&2
"$3" -c 'import fcntl, os; print("kvm=%d" % fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE00))' >&2
sed -n 's/^Cpus_allowed_list:\t/cpus=/p' /proc/self/status >&2
grep SigIgn /proc/self/status >&2
echo "host=$(hostname)" >&2
kill -USR1 $$
"""


@pytest.mark.lab
@pytest.mark.timeout(300)
def test_a_command_in_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacks := lab.missing():
        (pytest.skip if runs_linux() else pytest.fail)(f"LAYER MISSING: lab: {'; '.join(lacks)}")
    for name in ("a directory", "kept, and kept", "lost", "not named"):
        (tmp_path / name).mkdir()
    data = os.urandom(1 << 20)
    (tmp_path / "given").write_bytes(data)
    monkeypatch.chdir(tmp_path / "a directory")
    argv = ["sh", "-c", SCRIPT, "sh", str(tmp_path / "kept, and kept"), str(tmp_path / "lost"), sys.executable]
    with (
        open(tmp_path / "given", "rb") as given,
        open(tmp_path / "out", "wb") as out,
        open(tmp_path / "err", "wb") as err,
    ):
        status = lab.run(
            argv, write=["../kept, and kept"], timeout=240, memory="1G",
            stdin=given.fileno(), stdout=out.fileno(), stderr=err.fileno(),
        )  # fmt: skip
    said = (tmp_path / "err").read_text()
    assert status == 128 + 10, said
    assert (tmp_path / "out").read_bytes() == data
    assert said.splitlines()[0] == str(tmp_path / "a directory")
    facts = dict(re.findall(r"^(\w+)=(.*)$", said, re.MULTILINE))
    assert facts == {
        "overlay": "ok",
        "devices": "ok",
        "kvm": "12",
        "host": "pyvmm-lab",
        "hidden": "ok",
        "shadow": "hidden",
        "cgroup2": "ok",
        "modprobe": "ok",
        "avx": "none",
        "cpus": "1-2",  # a guest on CPU 0 may stand still
    }, said
    assert "SigIgn:\t0000000000000000" in said
    assert (tmp_path / "kept, and kept/by the command").read_text() == "kept\n"
    assert not os.listdir(tmp_path / "lost")
