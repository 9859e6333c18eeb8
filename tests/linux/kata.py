# SPDX-License-Identifier: Apache-2.0
"""Kata's two drivers with a Linux that is booted by Kata's own kernel arguments; what its agent says.

python -m tests.linux.kata [FIRECRACKER]     # where KVM runs Linux; writes one JSON object
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.peers.firecracker import Missing
from tests.api.oracle import ROOT
from tests.api.sandbox import Agent, Go, RuntimeRs
from tests.linux.kata_guest import guest

BLOCKS = "cd /sys/block; for each in vd*; do echo $each $(cat $each/size) $(cat $each/ro); done"


def link(directory: str) -> str:
    """A link named ``firecracker`` to these sources' program."""
    code = "from vmm.commands.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "link", "firecracker", directory]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def container(path: Path, mebibytes: int, said: str) -> Path:
    """An ext4 image with a file that says so."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "said").write_text(f"{said}\n")
        command = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", directory, str(path), f"{mebibytes}M"]
        subprocess.run(command, check=True, capture_output=True)
    return path


def _mounted(agent: Agent, device: str) -> str:
    return agent.ask(f"mount -t ext4 /dev/{device} /mnt && cat /mnt/said; df -k /mnt | tail -1; umount /mnt")


def go(program: str, room: Path) -> dict[str, Any]:
    """The Go runtime's sandbox."""
    made = guest()
    found: dict[str, Any] = {}
    with Go(program, made.kernel, made.image) as sandbox:
        found["seconds"] = round(sandbox.start(), 2)
        found["threads"] = sorted(sandbox.threads())
        with sandbox.agent() as agent:
            found["greeting"] = agent.greeting.decode()
            found["kernel"] = agent.ask("uname -r")
            found["cmdline"] = agent.ask("cat /proc/cmdline")
            found["acpi"] = agent.ask("ls /sys/firmware/acpi 2>&1")
            found["root"] = agent.ask("grep ' / ' /proc/mounts")
            found["blocks"] = agent.ask(BLOCKS)
            found["link"] = agent.ask("cat /sys/class/net/eth0/address")
            for number, mebibytes in ((3, 6), (0, 4), (7, 9)):
                answer = sandbox.plug(number, container(room / f"go{number}", mebibytes, f"drive_{number}"))
                assert answer is not None and answer.status == 204, answer
            found["plugged"] = agent.ask(BLOCKS)
            found["mounted"] = {name: _mounted(agent, name) for name in ("vdb", "vde", "vdi")}
            answer = sandbox.unplug(3)
            assert answer is not None and answer.status == 204, answer
            found["unplugged"] = agent.ask(BLOCKS)
        found["stopped_in"] = round(sandbox.stop(), 2)
        found["status"] = sandbox.process and sandbox.process.returncode
        found["log"] = sandbox.heard("logs").decode(errors="replace")
        found["metrics_lines"] = len(sandbox.heard("metrics").splitlines())
        found["console"] = sandbox.console()
    return found


def runtime_rs(program: str, room: Path) -> dict[str, Any]:
    """The Rust runtime's sandbox."""
    made = guest()
    found: dict[str, Any] = {}
    with RuntimeRs(program, made.kernel, made.image) as sandbox:
        found["sent"] = sandbox.start()
        with sandbox.agent() as agent:
            found["greeting"] = agent.greeting.decode()
            found["cmdline"] = agent.ask("cat /proc/cmdline")
            found["blocks"] = agent.ask(BLOCKS)
            found["link"] = agent.ask("cat /sys/class/net/eth0/address")
            for number, mebibytes in ((1, 4), (5, 9)):
                sandbox.plug(number, container(room / f"rs{number}", mebibytes, f"drive{number}"))
            found["plugged"] = agent.ask(BLOCKS)
            found["mounted"] = {name: _mounted(agent, name) for name in ("vdb", "vdf")}
        assert sandbox.process is not None
        found["early_end"] = sandbox.ended(0.2)
        sandbox.process.kill()
        found["end"] = sandbox.ended(10)
        found["console"] = (sandbox.room / "console").read_text(errors="replace")
    return found


def main(*arguments: str) -> int:
    """Both; a failure is written down."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as room:
        program = arguments[0] if arguments else link(room)
        for run in (go, runtime_rs):
            try:
                result[run.__name__] = run(program, Path(room))
            except (AssertionError, Missing, OSError, subprocess.SubprocessError) as error:
                result[run.__name__] = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))
    return 1 if any("failed" in each for each in result.values()) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
