# SPDX-License-Identifier: Apache-2.0
"""Sandboxes: what a command, a copy and files cost, beside podman with runc and gVisor from the same busybox.

On this host's own /dev/kvm; a guest is r3 where that is a software KVM. All run in turn. An engine that is missing, or
does not run here, is a row that says why; the others are measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from benches import sandboxes
from benches.peers import common, engines, native
from benches.peers.common import Row, alone, compare
from benches.peers.firecracker import Missing
from vmm import Sandbox, images
from vmm.errors import VmmError
from vmm.images import initramfs
from vmm.kvm.vm import runs_linux
from vmm.sandbox import guest

ROUNDS = 20
MIB = 1 << 20
FILE = 1024 * MIB
FILES = 3
LOOP = 50
CROWD = 20
# Root in a container without CAP_SYS_RESOURCE cannot raise its limits, which podman does otherwise.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
TRUE = ["/bin/busybox", "true"]


def _milliseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


class Podman:
    """Containers of busybox, with their storage below `directory`.

    :raises Missing: podman or runc is not here, or cannot make one
    """

    name = "podman with runc"

    def __init__(self, directory: Path) -> None:
        for program in ("podman", "runc"):
            if shutil.which(program) is None:
                raise Missing(f"{program}: apt-get install podman runc")
        self._command = [
            "podman", "--root", str(directory / "storage"), "--runroot", str(directory / "run"), "--runtime", "runc",
            "--cgroup-manager", "cgroupfs", "--events-backend", "none",
            "--storage-driver", "overlay", "--storage-opt", "overlay.skip_mount_home=true",
        ]  # fmt: skip
        self._run = ["run", "--network", "none", *LIMITS]
        binary, _ = initramfs.busybox()
        (directory / "busybox").write_bytes(binary)
        (directory / "busybox").chmod(0o755)
        with tarfile.open(directory / "image.tar", "w") as tar:
            tar.add(directory / "busybox", "bin/busybox")
        self.do("import", str(directory / "image.tar"), "bench")
        self.run()
        self.do(*self._run, "--detach", "--name", "kept", "bench", "/bin/busybox", "sleep", "1000")

    def do(self, *words: str) -> None:
        done = subprocess.run([*self._command, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"podman {words[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")

    def run(self) -> None:
        """A container that runs one command."""
        self.do(*self._run, "--rm", "bench", *TRUE)

    def exec(self) -> None:
        """A command in a running container."""
        self.do("exec", "kept", *TRUE)

    def close(self) -> None:
        """Leave no container."""
        with contextlib.suppress(Missing):
            self.do("rm", "--all", "--force", "--time", "0")


def _copy_and_run(sandbox: Sandbox) -> None:
    with sandbox.fork()[0] as copy:
        copy.run(TRUE, check=True)


def _commands(sandbox: Sandbox, peers: Sequence[Podman | engines.Runsc]) -> Iterator[Row]:
    ours: dict[str, tuple[Callable[[], object], float, str]] = {
        "exec of true": (lambda: sandbox.run(TRUE, check=True), 5, "exec"),
        "fork and exec of true": (lambda: _copy_and_run(sandbox), 25, "run"),
    }
    for name, (call, goal, what) in ours.items():
        # One after another, as a program calls them; beside peers each finds a cache that another engine has filled.
        yield alone(f"sandbox: {name}", "ms", [_milliseconds(call) for _ in range(5 * ROUNDS)], goal)
        calls = {"ours": call, **{peer.name: getattr(peer, what) for peer in peers}}
        done = common.in_turn(ROUNDS, **{who: lambda call=call: _milliseconds(call) for who, call in calls.items()})
        for peer in peers:
            yield compare(f"sandbox: {name}, beside {what}", "ms", done["ours"], done[peer.name], peer.name, 1.0)
    # The guest's own share: what its shell takes for the same.
    loop = f"i=0; while [ $i -lt {LOOP} ]; do {' '.join(TRUE)}; i=$((i+1)); done"
    own = [_milliseconds(lambda: sandbox.run(loop, check=True)) / LOOP for _ in range(3)]
    yield alone("sandbox: fork and exec of true by the guest's own shell", "ms", own, None)


def _files(sandbox: Sandbox) -> Iterator[Row]:
    data = os.urandom(MIB) * (FILE // MIB)
    into, out = [], []
    for number in range(FILES + 1):
        begun = time.perf_counter()
        sandbox.files.write("/tmp/file", data)
        middle = time.perf_counter()
        assert sandbox.files.read_bytes("/tmp/file") == data
        end = time.perf_counter()
        if number:  # the first touches the guest's memory for the first time
            into.append(FILE / 1e6 / (middle - begun))
            out.append(FILE / 1e6 / (end - middle))
        else:
            yield alone(
                "sandbox: a file in, into memory that was never touched", "MB/s", [FILE / 1e6 / (middle - begun)], None
            )
    for name, rates in (("in", into), ("out", out)):
        yield alone(f"sandbox: a file {name}", "MB/s", rates, 500)._replace(more_is_better=True)


def _cold() -> None:
    with Sandbox(sandboxes.IMAGE, memory="128M") as sandbox:
        assert sandbox.run(["echo", "there"]).stdout == "there\n"


def rows() -> Iterator[Row | Missing]:
    """Every figure, with podman's if podman is installed.

    :raises Missing: no KVM, or no kernel for it
    """
    common.need_kvm()
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", place)
        if not runs_linux():
            patch.setenv(guest.KERNEL_VARIABLE, str(native.kernel()))
        try:
            images.pull(sandboxes.IMAGE)
        except VmmError as error:
            raise Missing(str(error)) from None
        before, during, _, _ = sandboxes.crowd(CROWD)
        own = (during.anonymous_kib - before.anonymous_kib) / 1024 / CROWD
        yield alone(f"sandbox: memory of one of {CROWD}, beside its guest's", "MiB", [own], 1.0)
        cold = common.in_turn(ROUNDS, ours=lambda: _milliseconds(_cold))["ours"]
        yield alone("sandbox: cold, to the first output", "ms", cold, 400)
        peers: list[Podman | engines.Runsc] = []
        try:
            for make in (lambda: Podman(Path(place)), lambda: engines.Runsc(Path(place), TRUE)):
                try:
                    peers.append(make())
                except Missing as problem:
                    yield problem
            yield from engines.others()
            with Sandbox(sandboxes.IMAGE, memory="128M") as sandbox:
                yield from _commands(sandbox, peers)
        finally:
            for peer in peers:
                peer.close()
        with Sandbox(sandboxes.IMAGE, memory=3 * FILE) as sandbox:
            yield from _files(sandbox)
