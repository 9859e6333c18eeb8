# SPDX-License-Identifier: Apache-2.0
"""The scenarios that only the lab can run, in one boot; what did not finish is run again in a boot of its own.

    python -m tests.linux.in_lab DIRECTORY [NAME...]

It waits for r3's build first: two CPUs are few.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.linux import r3
from tests.linux.scenarios import STOCK
from vmm import images, lab
from vmm.errors import VmmError
from vmm.images.host import PullError

ROOT = Path(__file__).parents[2]
TRIES = 3
# For all boots together, and for one of them.
ALL_MINUTES, BOOT_MINUTES = 15.0, 12.0
# In the directory: what was said, and the names of what was run again.
LOG, AGAIN = "lab.log", "again"


def result(directory: Path, name: str) -> dict[str, Any] | None:
    """What the scenario wrote; None: nothing, yet."""
    path = directory / f"{name}.json"
    if not path.exists():
        return None
    facts: dict[str, Any] = {"name": name, **json.loads(path.read_text())}
    return facts


def emulators_fault(result: dict[str, Any] | None) -> bool:
    """Whether a scenario in the lab has to be run again, in a boot of its own: it did not finish, such as a program
    that gets no answer of a guest, or its guest ended by a triple fault that it was not to end by. One that finished
    with a wrong result keeps it.

    Two faults of QEMU stopped guests dead, its own guests in there too: until 9.1 its VMRUN loses the interrupt shadow,
    and any CPU that restores its FPU can undo what CPU 0 does at VMRUN and #VMEXIT, which the lab goes round by running
    no guest on CPU 0 (docs/SPECIFICATION.md, "Guests that the lab loses"). On hardware KVM nothing is run again.
    """
    if result is None or result["status"] in (-1, 124) or (result["status"] and result.get("program")):
        return True
    said = "\n".join(str(result.get(key, "")) for key in ("stdout", "stderr", "error"))
    return result["name"] != "triple_fault" and "triple fault" in said


def _boot(directory: Path, names: list[str], seconds: float) -> None:
    with (directory / LOG).open("ab") as output:
        output.write(f"in the lab: {', '.join(names)}\n".encode())
        output.flush()
        try:
            lab.run(
                ["env", "-C", str(ROOT), sys.executable, "-m", "tests.linux.scenarios", str(directory), *names],
                write=[str(directory)], timeout=seconds, memory="3G", stdout=output.fileno(), stderr=output.fileno(),
            )  # fmt: skip
        except VmmError as error:
            output.write(f"{error}\n".encode())


def main(directory: str, *names: str) -> int:
    """Run them, as often as ``TRIES`` if they do not finish."""
    home = Path(directory)
    with contextlib.suppress(PullError):  # who needs it says why there is none
        r3.vmlinux()
        images.pull("busybox")
    begun = time.monotonic()
    for attempt in range(TRIES):
        unfinished = [name for name in names or STOCK if emulators_fault(result(home, name))]
        left = ALL_MINUTES * 60 - (time.monotonic() - begun)
        if not unfinished or left < 60:
            break
        if attempt:
            with (home / AGAIN).open("a") as file:
                file.writelines(f"{name}\n" for name in unfinished)
        _boot(home, unfinished, min(left, BOOT_MINUTES * 60))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
