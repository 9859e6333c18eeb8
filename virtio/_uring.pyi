# SPDX-License-Identifier: Apache-2.0
def probe() -> int:
    """Try to have a ring: 0, or why the kernel gives none, as an error number."""
