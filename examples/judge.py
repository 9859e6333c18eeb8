# SPDX-License-Identifier: Apache-2.0
"""Judges a program by tests with limits of time, processor and memory; it runs as nobody, in a copy for each test.

python examples/judge.py [IMAGE]
"""

from __future__ import annotations

import sys

from vmm import Sandbox
from vmm.sandbox import CommandTimeout, Result

TESTS = (("3 4", "7"), ("-1 1", "0"))
PROGRAMS = {
    "right": "read a b; echo $((a + b))",
    "wrong": "read a b; echo $((a - b))",
    "slow": "sleep 1000",
    "busy": "while :; do :; done",
    "talkative": "while :; do echo y; done",
    "curious": "cat /root/answers || exit 1",
}


def verdict(sandbox: Sandbox, program: str) -> str:
    """``accepted``, or what went wrong first."""
    for given, expected in TESTS:
        (copy,) = sandbox.fork(timeout=60)
        with copy:
            copy.files.write("/home/program", program, mode=0o644)
            try:
                result = copy.run(
                    ["sh", "/home/program"], input=given, user="nobody", cwd="/tmp", timeout=2, limit=4096,
                    limits={"cpu": 1, "nproc": 50, "fsize": 1 << 20},
                )  # fmt: skip
            except CommandTimeout as error:
                loud = error.result is not None and error.result.truncated
                return "too much output" if loud else "too slow"
        if (problem := wrong(result, expected)) is not None:
            return problem
    return "accepted"


def wrong(result: Result, expected: str) -> str | None:
    """What is wrong with one answer, or None."""
    if result.truncated:
        return "too much output"
    if result.out_of_memory:
        return "out of memory"
    if result.signal is not None:
        return f"ended by a limit ({result.cause})"
    if result.exit_code:
        return f"failed ({result.cause})"
    return None if result.stdout.strip() == expected else f"wrong answer: {result.stdout.strip()}"


def main(image: str = "debian") -> None:
    """Judge each program."""
    with Sandbox(image, memory="128M") as sandbox:
        sandbox.files.write("/root/answers", "secret", mode=0o600)
        for name, program in PROGRAMS.items():
            print(f"{name}: {verdict(sandbox, program)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
