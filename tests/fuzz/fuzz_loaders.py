# SPDX-License-Identifier: Apache-2.0
"""Fuzz the kernel loaders, guided by coverage: ``python tests/fuzz/fuzz_loaders.py --seconds 600``.

Needs atheris (pip install atheris). What it finds is left in tests/regressions/loaders, where a test
replays it; the corpus that it learns from goes to ``--corpus``, and is kept out of the repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: pip install atheris (pytest tests/fuzz needs only hypothesis)")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

with atheris.instrument_imports(include=["boot"]):
    import boot.bzimage
    import boot.payload  # noqa: F401 - load() imports it when it needs it, which would be too late
    from tests.boot import loader_input

from tests.boot.kernel_images import bzimage, compress, pvh_elf, vmlinux  # noqa: E402

FOUND = HERE.parent / "regressions" / "loaders"


def seeds() -> dict[str, bytes]:
    """Inputs of each kind, from which most of the loaders is reached."""
    inputs = {
        "pvh": b"\0\0" + pvh_elf(),
        "pvh32": b"\0\0" + pvh_elf(bits=32),
        "vmlinux": b"\0\0" + vmlinux(paddr=2 << 20),
        "initrd": b"\x20\x06\0" + pvh_elf(),
    }
    for method in loader_input.METHODS:
        packed = compress(method, vmlinux(paddr=2 << 20))
        inputs[method] = b"\0\0" + bzimage(packed, pref_address=2 << 20, init_size=4 << 20)
    for kind in range(1, 6):
        inputs[f"kind{kind}"] = bytes((0, kind)) + bytes(range(1, 200))
    return inputs


def one_input(data: bytes) -> None:
    """What atheris calls."""
    loader_input.run(data)


def main() -> None:
    parser = argparse.ArgumentParser(description="fuzz the kernel loaders")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path("/tmp/pyvmm-fuzz-loaders"))
    parser.add_argument("--seed", type=int, default=0, help="0 for another one each time")
    options = parser.parse_args()
    options.corpus.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (options.corpus / f"seed-{name}").write_bytes(data)
    FOUND.mkdir(parents=True, exist_ok=True)
    arguments = [
        sys.argv[0], str(options.corpus), str(FOUND), f"-artifact_prefix={FOUND}/",
        f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-print_final_stats=1",
        "-max_len=8192", "-timeout=20", "-rss_limit_mb=1024",
    ]  # fmt: skip
    atheris.Setup(arguments, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
