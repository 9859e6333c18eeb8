# SPDX-License-Identifier: Apache-2.0
"""Import in advance what a VMM needs later: a jail has no files of Python, and a seccomp filter opens none.

``tests/vmm/test_preload.py`` finds every import inside a function, and fails if one is missing then.
"""

from __future__ import annotations

import sys
from _frozen_importlib_external import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# Of ours, what any VM of `pyvmm serve` can use; what these import comes with them.
OURS = """
    vmm.commands.cli vmm.commands.serve vmm.api.server vmm.api.answer vmm.jail.seccomp vmm._faults
    vmm.config.cpu_template vmm.config.policy vmm.machine.console_socket boot.bzimage boot.payload devices.boot_timer
    virtio.balloon virtio.blk.device virtio.console virtio.fs.device virtio.mmio virtio.net.device virtio.net.host
    virtio.net.mmds virtio.rng virtio.vsock.device
""".split()
# Of the standard library, what is imported where it is used: in a thread of a running machine,
LATER = """
    _json _queue atexit bisect mmap resource select termios vmm.kvm._state vmm._uffd vmm.api.snapshots
    vmm.machine.snapshot zlib
""".split()
# of one with the metadata service,
METADATA = "base64 hmac httptools msgspec".split()
# and before it runs.
EARLIER = """
    _socket bz2 collections.abc ctypes json.decoder lzma re signal traceback zlib
""".split()
# What the standard library and msgspec import by themselves, when they first need it.
HIDDEN = """
    _datetime datetime decimal encodings.ascii encodings.idna encodings.latin_1 linecache uuid
""".split()
# Shared libraries by ctypes, and what the C library loads when a thread is cancelled.
LIBRARIES = ("liblz4.so.1", "libzstd.so.1", "libgcc_s.so.1")


def preload_later() -> None:
    """Import what threads of a running machine import, and let the C library learn the time zone.

    What is imported after that is compiled in memory alone.
    """
    import time

    load(LATER)
    # A finder lists its directory when it is first asked, and a loader would write what it compiled: no filter lets it.
    PathFinder.find_spec("no module has this name")
    sys.dont_write_bytecode = True
    time.localtime()


def load(names: Iterable[str]) -> None:
    """Import `names`."""
    for name in names:
        __import__(name)


def preload() -> None:
    """Import all of it."""
    import ctypes

    load((*OURS, *EARLIER, *HIDDEN, *METADATA))
    preload_later()
    for library in LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            pass  # a kernel packed so is refused then, as anywhere without the library
