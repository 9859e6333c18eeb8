# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.linux.r3``: build r3, if that has not been done, and print the path of its vmlinux."""

from __future__ import annotations

import sys

from tests.linux.r3 import vmlinux
from vmm.images.host import PullError


def _say(step: str, done: float | None) -> None:
    if done in (None, 1.0):
        print(f"r3: {step}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(vmlinux(_say))
    except PullError as error:
        sys.exit(f"r3: {error}")
