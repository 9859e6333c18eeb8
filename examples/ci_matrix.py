# SPDX-License-Identifier: Apache-2.0
"""A matrix of jobs, side by side: what they share is set up once, and each job goes on from there in a copy.

python examples/ci_matrix.py [IMAGE]
"""

from __future__ import annotations

import asyncio
import sys

from vmm.sandbox import AsyncSandbox, Result

MATRIX = [{"LEVEL": level, "MODE": mode} for level in ("1", "2") for mode in ("fast", "safe")]
SETUP = "mkdir -p /src && echo 'test $LEVEL$MODE != 2fast && echo ok $LEVEL $MODE' >/src/run-tests"


async def job(sandbox: AsyncSandbox, variables: dict[str, str]) -> Result:
    """One cell, in a sandbox of its own."""
    async with sandbox, asyncio.timeout(60):
        return await sandbox.run("sh /src/run-tests", env=variables)


async def main(image: str = "debian") -> int:
    """Print a line for each cell; returns how many failed."""
    sandbox = await AsyncSandbox.create(image, memory="256M")
    try:
        await sandbox.run(SETUP, check=True)
        copies = await sandbox.fork(len(MATRIX))
        results = await asyncio.gather(*map(job, copies, MATRIX))
    finally:
        await sandbox.close()
    for variables, result in zip(MATRIX, results, strict=True):
        print(f"{variables}: {result.cause} {result.stdout.strip()}".strip())
    return sum(result.exit_code != 0 for result in results)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
