# SPDX-License-Identifier: Apache-2.0
"""pyvmm attach to a Linux guest: a shell's command is typed, its answer read."""

from __future__ import annotations

import os
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.jail.terminal import Terminal
from tests.linux.kernels import kernel
from tests.waiting import PATIENCE, until

PYVMM = str(Path(sys.executable).with_name("pyvmm"))
INIT = "#!/bin/sh\nexport PATH=/sbin:/bin PS1='guest# '\nexec sh\n"


@pytest.mark.parametrize("device", ["serial", "virtio"])
def test_a_shell_on_an_attached_terminal(native: None, tmp_path: Path, device: str) -> None:
    made = kernel()
    initrd, path = tmp_path / "initrd", tmp_path / "console"
    initrd.write_bytes(made.initrd(("virtio_mmio", "virtio_console"), INIT))
    words = [PYVMM, "run", made.path, "--initrd", str(initrd), "--memory", "128M", "--console", f"unix:{path}"]
    words += ["--virtio-console"] * (device == "virtio")
    vm = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        until(path.exists)
        terminal = Terminal("fg", [PYVMM, "attach", str(path)])
        try:
            terminal.hear(b"guest# ")
            os.write(terminal.master, b"echo $((6*7))\r")
            terminal.hear(b"\n42\r\n")
            os.write(terminal.master, b"poweroff -f\r")
            terminal.hear(b"pyvmm attach: " + str(path).encode() + b": the VM has ended\r\n")
            assert terminal.end() == 0
            assert termios.tcgetattr(terminal.slave) == terminal.before
        finally:
            terminal.close()
        assert vm.wait(PATIENCE) == 0
    finally:
        vm.kill()
        vm.wait()
