# SPDX-License-Identifier: Apache-2.0
"""Runs code that an agent wrote: each piece in a copy of a sandbox, so that none sees or breaks what another left.

python examples/code_runner.py [IMAGE [INTERPRETER]]
"""

from __future__ import annotations

import sys

from vmm import Sandbox
from vmm.sandbox import CommandTimeout

PIECES = {
    "adds": "echo $((20 + 22))",
    "reads what was prepared": "cat /data/numbers | wc -l",
    "breaks everything": "rm -rf /bin /data; echo gone",
    "is not hurt by that": "cat /data/numbers | wc -l",
    "has a mistake": "cat /data/letters",
    "never ends": "while :; do :; done",
}


def run_piece(prepared: Sandbox, interpreter: str, code: str) -> str:
    """What a piece of code printed, or why it failed, in words that an agent can act on."""
    (copy,) = prepared.fork(timeout=30)
    with copy:
        copy.files.write("/tmp/code", code)
        try:
            result = copy.run([interpreter, "/tmp/code"], timeout=2, limit=10_000)
        except CommandTimeout as error:
            return str(error)
    said = result.stdout.strip() or result.stderr.strip()
    return said if result.exit_code == 0 else f"{result.cause}: {said}"


def main(image: str = "debian", interpreter: str = "/bin/sh") -> None:
    """Prepare one sandbox, and give each piece a copy."""
    with Sandbox(image, memory="256M") as prepared:
        prepared.files.write("/data/numbers", "1\n2\n3\n")
        for name, code in PIECES.items():
            print(f"{name}: {run_piece(prepared, interpreter, code)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
