# SPDX-License-Identifier: Apache-2.0
"""The scenarios that take longest, run in a process beside the other layers' tests, which the session begins with.

    python -m tests.linux.begun DIRECTORY [lab] [devices]

One after the other, and r3's build before them: two CPUs are few. A result is PART/NAME.json in the directory.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from tests.linux import in_lab, kernels
from tests.linux.in_lab import AGAIN, LOG, ROOT
from tests.linux.tools_guest import tools_image
from vmm.images.host import PullError

# r3's own end: its kernel takes an interrupt that comes at its IRET for a fault of that IRET (error_entry).
# Seen in pyvmm and in Firecracker, a few times in a hundred runs under a storm of interrupts.
R3_FAULT = "fixup_bad_iret"


def start(directory: Path, *parts: str) -> subprocess.Popen[bytes]:
    """Begin in a process of its own, with its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(directory), *parts], cwd=ROOT, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def here(module: str, directory: Path, *names: str) -> str:
    """Run scenarios here, and once more those whose guest ended by r3's own fault; what was said."""
    said = _run(module, directory, *names)
    faulty = [path.stem for path in directory.glob("*.json") if R3_FAULT in path.read_text()]
    if again := [name for name in faulty if not names or name in names]:
        with (directory / AGAIN).open("a") as file:
            file.writelines(f"{name}\n" for name in again)
        said += _run(module, directory, *again)
    return said


def _run(module: str, directory: Path, *names: str) -> str:
    command = [sys.executable, "-m", module, str(directory), *names]
    if os.geteuid() == 0:  # taps, routes and filters are made in a network of their own
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout.decode(errors="replace")


def main(directory: str, *parts: str) -> int:
    """Run the parts, each in a directory of its own."""
    for part in parts:
        home = Path(directory, part)
        home.mkdir()
        if part == "lab":
            in_lab.main(str(home))
            continue
        with contextlib.suppress(PullError):  # who needs it says why there is none
            tools_image(kernels.kernel())
            (home / LOG).write_text(here("tests.linux.device_scenarios", home))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
