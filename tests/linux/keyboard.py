# SPDX-License-Identifier: Apache-2.0
"""Linux's keyboard driver at our i8042, and what such a VM says of itself.

python -m tests.linux.keyboard      # where KVM runs Linux; writes one JSON object
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.linux.kernels import kernel
from tests.linux.small_devices import INIT, PATIENCE, Guest
from vmm import logger
from vmm.observe.metrics import Metrics

BASE = "console=ttyS0 reboot=k panic=-1 i8042.noaux i8042.nomux quiet"
# What Kata and Firecracker's own documents give a guest, in the point of its keyboard.
KATA = f"{BASE} acpi=off pci=off i8042.nopnp i8042.dumbkbd"
ASK = "cat /proc/bus/input/devices; dmesg | grep -iE 'i8042|atkbd|serio'; grep -i i8042 /proc/interrupts"


def press(kernel: str, initrd: str, facts: dict[str, Any], **settings: Any) -> None:
    """Boot, look at the keyboard, press Ctrl-Alt-Del, see how the guest ends."""
    directory = Path(os.environ.get("TMPDIR", "/tmp"))
    metrics_file, log = directory / "keyboard.metrics", directory / "keyboard.log"
    metrics_file.write_bytes(b"")
    log.write_bytes(b"")
    logger.configure(log_path=str(log), vmm_id="keyboard", show_level=True)
    metrics = Metrics("keyboard")
    metrics.configure(str(metrics_file))
    guest = Guest(kernel, initrd, append="", boot_timer=True, **settings)
    try:
        metrics.attach(guest.vm)
        facts["seen"] = guest.run(ASK)
        facts["timer"] = guest.run("devmem 0xd0000000 8 123; echo $?")
        facts["log"] = log.read_text()
        start = time.monotonic()
        guest.vm.send_ctrl_alt_del()
        stop = guest.vm.wait(PATIENCE)
        facts["end"] = stop and stop.reason.value
        facts["seconds"] = round(time.monotonic() - start, 2)
        facts["metrics"] = [json.loads(line) for line in metrics_file.read_text().splitlines()]
        facts["prometheus"] = metrics.prometheus()
    finally:
        guest.vm.close()


def main() -> int:
    made = kernel()
    initrd = Path(os.environ.get("TMPDIR", "/tmp"), "keyboard.cpio")
    initrd.write_bytes(made.initrd((), INIT))
    facts: dict[str, dict[str, Any]] = {"acpi": {}, "kata": {}}
    try:
        press(made.path, str(initrd), facts["acpi"], cmdline=BASE, keyboard=True)
        press(made.path, str(initrd), facts["kata"], cmdline=KATA)
    finally:
        json.dump(facts, sys.stdout)  # what was found before it went wrong, too
    return 0


if __name__ == "__main__":
    sys.exit(main())
