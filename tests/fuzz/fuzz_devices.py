# SPDX-License-Identifier: Apache-2.0
"""Run random driver programs against the devices: ``python -m tests.fuzz.fuzz_devices --programs 100000 blk net``.

A program that harms this process ends it; the last line says which device and which seed it was. With the extensions
built by AddressSanitizer (``make asan``) what it sees ends it too.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.driver_programs import KINDS, Victim


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.fuzz_devices", description=__doc__)
    parser.add_argument("names", metavar="DEVICE", nargs="*", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--programs", type=int, default=10_000, help="for each device (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the next ones count up")
    parser.add_argument(
        "--races", action="store_true", help="another processor changes descriptors and buffers meanwhile"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(KINDS):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; there are {', '.join(KINDS)}")
    for name in arguments.names or KINDS:
        start = time.monotonic()
        seed = arguments.seed
        with Victim(name, races=arguments.races) as victim:
            try:
                for seed in range(arguments.seed, arguments.seed + arguments.programs):
                    if seed % 1000 == 0:
                        print(f"\r{name}: {seed}", end="", file=sys.stderr, flush=True)
                    victim.run(seed)
            except BaseException:
                print(f"\n{name}: seed {seed}", file=sys.stderr, flush=True)
                raise
            took = time.monotonic() - start
            counters = ", ".join(f"{key} {value}" for key, value in victim.device.stats.items() if value)
        print(f"\r{name}: {arguments.programs} programs in {took:.0f} s; {counters}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
