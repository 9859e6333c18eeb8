# SPDX-License-Identifier: Apache-2.0
"""A sandbox on a stock kernel with two CPUs: what it and its copy say, as JSON. Run in the lab."""

from __future__ import annotations

import json
import os
import sys

from vmm import Sandbox


def main() -> int:
    """Print what came of it."""
    os.environ.pop("PYVMM_SANDBOX_KERNEL", None)  # r3's, where a session set it
    with Sandbox("busybox", memory="160M", cpus=2, boot_timeout=300) as sandbox:
        facts = {
            "cpus": sandbox.run("nproc", timeout=120).stdout.strip(),
            "kernel": sandbox.run("uname -r", timeout=120).stdout.strip(),
            # Two at once: each waits for the other's file.
            "both": [
                process.wait(120).exit_code
                for process in [
                    sandbox.exec(f"touch /tmp/{mine}; while [ ! -e /tmp/{other} ]; do :; done", timeout=120)
                    for mine, other in (("a", "b"), ("b", "a"))
                ]
            ],
        }
        sandbox.files.write("/tmp/data", b"x" * 1_000_000)
        (copy,) = sandbox.fork()
        with copy:
            facts["copy"] = copy.run("nproc; wc -c </tmp/data; hostname", timeout=120).stdout.split()
            facts["name"] = copy.name
            facts["random"] = [
                each.run("head -c 16 /dev/urandom | md5sum", timeout=120).stdout for each in (sandbox, copy)
            ]
        facts["after"] = sandbox.run("wc -c </tmp/data", timeout=120).stdout.strip()
    json.dump(facts, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
