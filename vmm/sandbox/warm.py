# SPDX-License-Identifier: Apache-2.0
"""Sandboxes that start from a snapshot, which the first of its kind on this host has left.

``CACHE/warm/KEY`` is a snapshot of one that has come up and done nothing. Its memory is shared copy-on-write between
all that start from it. The last ``KEPT`` that were used are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil

from vmm import __version__
from vmm.errors import VmmError
from vmm.images import cache_root
from vmm.sandbox import guest
from vmm.sandbox.sandbox import Sandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.images import Image

KEPT = 8


def start(image: Image, *, memory: int, cpus: int, network: str, boot_timeout: float) -> Sandbox:
    """A sandbox that is up; parameters as :class:`vmm.Sandbox` has them.

    :raises VmmError: the sandbox did not start

    One with a network boots each time.
    """
    directory = os.path.join(cache_root(), "warm", _key(image, memory, cpus))
    if network == "none" and os.path.isdir(directory):
        try:
            os.utime(directory)
            return Sandbox.restore(directory)
        except (VmmError, OSError):  # damaged, or of another CPU
            shutil.rmtree(directory, ignore_errors=True)
    sandbox = Sandbox(image, memory=memory, cpus=cpus, network=network, boot_timeout=boot_timeout)
    if network == "none":
        with contextlib.suppress(VmmError, OSError):  # what cannot be kept is made again
            _keep(sandbox, directory)
    return sandbox


def _key(image: Image, memory: int, cpus: int) -> str:
    """Changes with all that a snapshot depends on."""
    kernel = os.environ.get(guest.KERNEL_VARIABLE) or image.kernel
    paths = (kernel, image.initrd, *image.disks)
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    agent = hashlib.sha256(guest.agent()).hexdigest()
    facts = (__version__, agent, files, image.config, memory, cpus)
    return hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()[:24]


def _keep(sandbox: Sandbox, directory: str) -> None:
    above = os.path.dirname(directory)
    os.makedirs(above, 0o700, exist_ok=True)
    sandbox.snapshot(directory)
    found = [os.path.join(above, name) for name in os.listdir(above)]  # what killed processes have begun, too
    for old in sorted(found, key=os.path.getmtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
