# SPDX-License-Identifier: Apache-2.0
"""Damage snapshots at random and load them: ``python -m tests.fuzz.fuzz_snapshots --minutes 60``.

A child process tries many, one after the other. A snapshot is a finding if it ends the child, delays it, or raises
something else than a refusal. Its ``state`` is then left in ``--found``.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.damaged_snapshots import Victim

PATIENCE = 20  # seconds for one
BATCH = 2000


def child(victim: Victim, first: int, end: float, out: int) -> None:
    """Try seeds from `first` on, and say each before it is tried, and how it ended."""
    for seed in range(first, first + BATCH):
        if time.monotonic() > end:
            return
        os.write(out, f"{seed} ".encode())
        try:
            why = victim.try_(victim.damaged(seed))
        except BaseException:
            sys.stderr.write(f"seed {seed}:\n")
            traceback.print_exc()
            os._exit(1)
        os.write(out, b"ok " if not why else b"no ")


def watch(victim: Victim, first: int, end: float, counts: collections.Counter[str]) -> tuple[int, str]:
    """Let a child try seeds from `first` on: the next one to try, and what was wrong with the one before it."""
    inner, outer = os.pipe()
    pid = os.fork()
    if not pid:
        child(victim, first, end, outer)
        os._exit(0)
    os.close(outer)
    said, seed, hung = b"", first, False
    while True:
        if not select.select([inner], [], [], PATIENCE)[0]:
            hung = True
            os.kill(pid, signal.SIGKILL)
        if not (data := os.read(inner, 65536)):
            break
        *words, said = (said + data).split(b" ")
        for word in words:
            if word.isdigit():
                seed = int(word)
            else:
                counts[word.decode()] += 1
    os.close(inner)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return seed + 1, "" if not status else "hung" if hung else f"ended with {status}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.fuzz_snapshots", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the next ones count up")
    parser.add_argument("--found", type=Path, default=Path("build/snapshots-found"), help="a directory for findings")
    arguments = parser.parse_args()
    begun = time.monotonic()
    seed, found = arguments.seed, 0
    counts: collections.Counter[str] = collections.Counter()
    with Victim() as victim:
        while time.monotonic() < begun + arguments.minutes * 60:
            seed, wrong = watch(victim, seed, begun + arguments.minutes * 60, counts)
            if wrong:
                found += 1
                state = victim.damaged(seed - 1)
                arguments.found.mkdir(parents=True, exist_ok=True)
                (arguments.found / hashlib.sha256(state).hexdigest()[:12]).write_bytes(state)
                print(f"seed {seed - 1}: {wrong}", flush=True)
    print(
        f"{seed - arguments.seed} snapshots: {counts['no']} refused, {counts['ok']} ran, {found} findings", flush=True
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
