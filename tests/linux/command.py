# SPDX-License-Identifier: Apache-2.0
"""The command ``pyvmm`` of this checkout, as a user types it."""

from __future__ import annotations

import subprocess
import sys


def pyvmm(*words: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run it to its end, within 100 seconds."""
    return subprocess.run([sys.executable, "-m", "vmm", *words], input=input, capture_output=True, timeout=100)
