# SPDX-License-Identifier: Apache-2.0
"""Other sandbox engines: gVisor's runsc from Debian, and why those that use libkrun are not measured."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benches.peers.firecracker import Missing
from vmm.errors import VmmError
from vmm.images import apt, initramfs
from vmm.kvm.vm import runs_linux

SUITE = "trixie"  # of bookworm it has no systrap
PLATFORM = "systrap"  # its KVM platform hangs on a software KVM
# PyPI's wheels of the versions that were tried, and what they said on a software KVM (docs/SPECIFICATION.md, 10).
KRUN = {
    "boxlite 0.10.8": "krun_vmm: Received KVM_EXIT_INTERNAL_ERROR signal",
    "microsandbox 0.7.11": "msb_krun_vmm: Received KVM_EXIT_INTERNAL_ERROR signal",
    "smolmachines 1.32.2": "no word from its guest in 40 s",
}


def others() -> Iterator[Missing]:
    """A row for each engine whose guest is libkrun's stock kernel."""
    for engine, said in KRUN.items():
        if runs_linux():
            yield Missing(f"{engine}: this bench has no driver for it")
        else:
            yield Missing(f"{engine}: its kernel does not run on this host's software KVM; tried by hand, said: {said}")


class Runsc:
    """Containers of busybox by gVisor, below `directory`; one is kept for ``exec``.

    :raises Missing: runsc cannot be fetched, or does not run here
    """

    name = f"runsc ({PLATFORM})"

    def __init__(self, directory: Path, command: list[str]) -> None:
        try:
            package = apt.package("runsc", suite=SUITE)
        except VmmError as error:
            raise Missing(f"runsc: {error}") from None
        self._bundles = directory / "runsc"
        self._command = [
            str(package.tree / "usr/bin/runsc"), "--root", str(self._bundles / "root"), "--network", "none",
            "--platform", PLATFORM, "--ignore-cgroups",
        ]  # fmt: skip
        self._words = command
        self._bundle("once", command)
        kept = self._bundle("kept", ["/bin/busybox", "sleep", "1000"])
        self.run()
        self._do("run", "--detach", "--bundle", str(kept), "kept")
        self.exec()

    def _bundle(self, name: str, args: list[str]) -> Path:
        bundle = self._bundles / name
        (bundle / "rootfs/bin").mkdir(parents=True)
        program = bundle / "rootfs/bin/busybox"
        program.write_bytes(initramfs.busybox()[0])
        program.chmod(0o755)
        self._do("spec", cwd=bundle)
        config = json.loads((bundle / "config.json").read_text())
        config["process"].update(args=args, terminal=False)
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle

    def _do(self, *words: str, cwd: Path | None = None) -> None:
        # A container that stays keeps its output open, so a pipe from us would never end.
        with open(self._bundles / "said", "w+") as said:
            try:
                done = subprocess.run(
                    [*self._command, *words], cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=20
                )
            except subprocess.TimeoutExpired:
                raise Missing(f"runsc {words[0]}: no end in 20 s") from None
            if done.returncode:
                said.seek(0)
                last = (said.read().strip().splitlines() or [f"status {done.returncode}"])[-1]
                raise Missing(f"runsc {words[0]}: {last}")

    def run(self) -> None:
        """A container that runs one command."""
        self._do("run", "--bundle", str(self._bundles / "once"), "once")

    def exec(self) -> None:
        """A command in a running container."""
        self._do("exec", "kept", *self._words)

    def close(self) -> None:
        """Leave no container."""
        for name in ("once", "kept"):
            with contextlib.suppress(Missing):
                self._do("delete", "--force", name)
