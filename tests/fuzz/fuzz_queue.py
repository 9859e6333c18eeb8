# SPDX-License-Identifier: Apache-2.0
"""Fuzz the virtqueue, guided by the coverage of its Python twin: ``python tests/fuzz/fuzz_queue.py --seconds 600``.

An input is the rings and the descriptor tables as a driver might leave them; the C queue and the twin must say the same
of it and leave the same memory. Needs atheris (pip install atheris).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: pip install atheris (tests/virtio/test_queue_differential.py needs it not)")

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["tests.virtio.queue_twin"]):
    from tests.virtio import queue_twin  # noqa: F401 - the twin, instrumented

from tests.virtio.test_queue_differential import TABLE, Pair, shape

SIZE = 8
PAIRS = {
    flags: Pair(SIZE, event_idx=bool(flags & 1), indirect=bool(flags & 2), start=0, seed=flags) for flags in range(4)
}


def play(ram: Any, driver: Any, queue: Any, data: bytes, *, indirect: bool) -> None:
    """Leave memory as `data` says: descriptors, an indirect table, the available ring and its event."""
    queue.reset()
    driver.attach(queue, indirect=indirect)
    ram.write(driver.used, bytes(6 + 8 * SIZE))
    at = 0
    for address, length in ((driver.desc, 16 * SIZE), (TABLE, 16 * 9), (driver.avail, 6 + 2 * SIZE)):
        ram.write(address, data[at : at + length].ljust(length, b"\0"))
        at += length


def one_input(data: bytes) -> None:
    """What atheris calls."""
    if not data:
        return
    pair = PAIRS[data[0] & 3]
    for side in pair.sides:
        play(*side, data[1:], indirect=bool(data[0] & 2))
    for _ in range(SIZE + 1):
        ours, twins = pair.pop()
        if ours is None or isinstance(ours, str):
            break
        for chain, (_, _, queue) in zip((ours, twins), pair.sides, strict=True):
            queue.add_used(chain, min(chain.writable_bytes, 0xFFFF_FFFF))
        pair.same(lambda ram, driver, queue: queue.flush())
        assert shape(ours) == shape(twins)
    pair.same(lambda ram, driver, queue: queue.enable_notify())
    pair.check()


def seed() -> bytes:
    """A ring with one chain of three and one in an indirect table."""
    pair = Pair(SIZE, event_idx=True, indirect=True, start=0)
    ram, driver, _ = pair.sides[0]
    driver.add([driver.buffer(16), driver.buffer(512, device_writes=True), driver.buffer(1, device_writes=True)])
    driver.write_desc(7, TABLE, 32, 4)
    driver.offer(7)
    inner = bytes.fromhex("0080000000000000100000000100010000800000000000000001000002000000")
    parts = ram.read(driver.desc, 16 * SIZE), inner.ljust(16 * 9, b"\0"), ram.read(driver.avail, 6 + 2 * SIZE)
    pair.close()
    return b"\3" + b"".join(bytes(part) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="fuzz the virtqueue")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path("/tmp/pyvmm-fuzz-queue"))
    parser.add_argument("--seed", type=int, default=0, help="0 for another one each time")
    options = parser.parse_args()
    options.corpus.mkdir(parents=True, exist_ok=True)
    (options.corpus / "seed").write_bytes(seed())
    arguments = [
        sys.argv[0], str(options.corpus), f"-artifact_prefix={options.corpus}/found-",
        f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-print_final_stats=1", "-max_len=320",
        "-timeout=20",
    ]  # fmt: skip
    atheris.Setup(arguments, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
