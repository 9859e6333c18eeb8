# SPDX-License-Identifier: Apache-2.0
"""Check that many sandboxes leak nothing: ``python -m benches.sandboxes churn 2000`` and ``crowd 200``.

``churn N`` makes a sandbox, runs a command, forks it, runs a command in the copy and closes both, until N sandboxes
were made. ``crowd N`` has N sandboxes of 64 MiB at once and runs a command in each. At the end this process must have
no more descriptors, threads, child processes and files than after the first sandbox; otherwise the exit status is 1.
Memory is only reported. It grows: closed sandboxes wait for the garbage collector, and arenas keep the room they had.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from vmm import Sandbox, images
from vmm.kvm.vm import runs_linux
from vmm.sandbox import guest

IMAGE = "busybox"
MEMORY = "64M"


class Held(NamedTuple):
    """The resources that this process holds."""

    descriptors: int
    threads: int
    children: int
    files: int  # of sandboxes, where they keep theirs
    anonymous_kib: int  # memory of its own; a sandbox's guest has shared memory until it is forked

    @classmethod
    def now(cls) -> Held:
        """Count the resources now, without memory that Python and malloc keep for later."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        place = Path(os.environ["XDG_RUNTIME_DIR"], "pyvmm/sandboxes")
        status = Path("/proc/self/status").read_text()
        return cls(
            len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")),
            len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
            sum(1 for _ in place.rglob("*")) if place.exists() else 0,
            int(status.partition("RssAnon:")[2].split()[0]),
        )  # fmt: skip

    def exceeds(self, other: Held) -> bool:
        """Whether this has more than the other of any resource but memory."""
        return any(mine > theirs for mine, theirs in zip(self[:4], other[:4], strict=True))


def settled(wanted: Held) -> Held:
    """Wait up to ten seconds until this process holds no more than `wanted`. Return what it holds."""
    until = time.monotonic() + 10
    while (held := Held.now()).exceeds(wanted) and time.monotonic() < until:
        time.sleep(0.01)
    return held


def churn(count: int, say: bool = False) -> tuple[Held, Held, list[float], list[float]]:
    """Make and close `count` sandboxes, half of them copies.

    :returns: what was held after the first pair, and after the last; seconds to make and run, and to copy and run
    """
    first: Held | None = None
    made: list[float] = []
    copied: list[float] = []
    while 2 * len(made) < count or first is None:
        begun = time.perf_counter()
        with Sandbox(IMAGE, memory=MEMORY) as sandbox:
            assert sandbox.run(["echo", "one"]).stdout == "one\n"
            made.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            with sandbox.fork()[0] as copy:
                assert copy.run(["echo", "two"]).stdout == "two\n"
                copied.append(time.perf_counter() - begun)
        if first is None:
            first = Held.now()
        if say and len(made) % 100 == 0:
            print(f"{2 * len(made)} sandboxes: {Held.now()}", flush=True)
    return first, settled(first), made, copied


def crowd(count: int) -> tuple[Held, Held, Held, list[float]]:
    """Run `count` sandboxes at once.

    :returns: what was held before, with all of them, and after; seconds of a command in each while all are there
    """
    with Sandbox(IMAGE, memory=MEMORY) as sandbox:
        sandbox.run(["true"])
    before = Held.now()
    all_of_them: list[Sandbox] = []
    seconds = []
    try:
        while len(all_of_them) < count:
            all_of_them.append(Sandbox(IMAGE, memory=MEMORY))
        for number, sandbox in enumerate(all_of_them):
            begun = time.perf_counter()
            assert sandbox.run(["echo", str(number)]).stdout == f"{number}\n"
            seconds.append(time.perf_counter() - begun)
        during = Held.now()
    finally:
        for sandbox in all_of_them:
            sandbox.close()
    return before, during, settled(before), seconds


def main() -> int:
    """Run the benchmark and print the resources held; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benches.sandboxes", description=__doc__)
    parser.add_argument("what", choices=("churn", "crowd"))
    parser.add_argument("count", type=int)
    arguments = parser.parse_args()
    images.pull(IMAGE)
    if not runs_linux():
        from tests.linux import r3

        os.environ.setdefault(guest.KERNEL_VARIABLE, str(r3.vmlinux()))
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_RUNTIME_DIR"] = place
        begun = time.monotonic()
        if arguments.what == "churn":
            before, after, made, copied = churn(arguments.count, say=True)
            for what, seconds in (("made and run", made), ("copied and run", copied)):
                print(f"{len(seconds)} {what}: p50 {statistics.median(seconds) * 1e3:.0f} ms")
        else:
            before, during, after, seconds = crowd(arguments.count)
            print(f"{arguments.count} at once: {during}")
            own = (during.anonymous_kib - before.anonymous_kib) / arguments.count
            print(f"memory of each beside its guest's: {own:.0f} KiB")
            print(f"a command in each: p50 {statistics.median(seconds) * 1e3:.1f} ms, most {max(seconds) * 1e3:.0f} ms")
        print(f"before: {before}\nafter:  {after}\nin {time.monotonic() - begun:.0f} s")
    return int(after.exceeds(before))


if __name__ == "__main__":
    sys.exit(main())
