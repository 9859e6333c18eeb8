# SPDX-License-Identifier: Apache-2.0
"""Every comparison with other VMMs: ``python -m benches.peers [NAME]...``; the names are below.

Prints a line for each figure and writes bench-results/peers.json and peers.png. The exit status is 1 if a goal is
missed or a figure cannot be measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from benches.peers.common import ROOT, Row
from benches.peers.firecracker import Missing

DEVICES = ("blk", "ext4", "queues", "net", "netqueues", "passt", "vsock", "fs")
ALONE = ("start", "launch", "memory", "exits", "boot", "ring3", "api", "snapshots", "restore", "scale", "sandbox")
NAMES = (*ALONE, *DEVICES)

# Loops for 0.3 s and prints the share of that time in which it did not run: gaps of over 0.1 ms between two turns.
_SPIN = """
from time import perf_counter
before = end = perf_counter()
end += 0.3
lost = 0.0
while before < end:
    now = perf_counter()
    if now - before > 1e-4:
        lost += now - before
    before = now
print(lost / 0.3)
"""


def lost_time() -> float:
    """The share of processor time that others take, on this machine or on its host. Looping programs measure it.

    The load average does not show what a host gives to other VMs. Above 0.05, ratios with waits in them mean little.
    """
    command = [sys.executable, "-I", "-S", "-c", _SPIN]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(os.cpu_count() or 1)]
    return sum(float(loop.communicate()[0]) for loop in loops) / len(loops)


def _facts() -> dict[str, object]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "software_kvm": os.path.exists("/sys/module/kvm_pvm"),
        "python": platform.python_version(),
    }


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9, 1.1 * len(rows) + 0.5), squeeze=False)
    for row, ax in zip(rows, axes[:, 0], strict=True):
        ax.boxplot([list(values) for values in row.samples.values()], orientation="horizontal", widths=0.6)
        ax.set_yticklabels(list(row.samples), fontsize=8)
        ax.tick_params(axis="x", labelsize=7)
        ax.set_title(str(row), fontsize=7, loc="left", color="black" if row.held else "red")
        ax.set_xlim(left=min(0, ax.get_xlim()[0]))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the named comparisons, or all of them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benches.peers", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench-results", metavar="DIR")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; there are {', '.join(NAMES)}")

    rows: list[Row] = []
    missing: list[str] = []
    lost = [lost_time()]
    for name in arguments.names or NAMES:
        try:
            if name in DEVICES:
                found = importlib.import_module("benches.peers.devices").rows(name)
            else:
                found = importlib.import_module(f"benches.peers.{name}").rows()
        except Missing as problem:
            found = [problem]
        for one in found:
            if isinstance(one, Missing):
                missing.append(f"{name}: {one}")
                print(f"MISSING: {missing[-1]}", flush=True)
            else:
                rows.append(one)
                print(one, flush=True)

    lost.append(lost_time())
    print(f"processor time taken by others, before and after: {lost[0]:.0%}, {lost[1]:.0%}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {
        **_facts(),
        "lost": lost,
        "rows": [row._asdict() | {"held": row.held} for row in rows],
        "missing": missing,
    }
    (arguments.output / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
    if rows:
        _plot(rows, arguments.output / "peers.png")
    return 1 if missing or not all(row.held for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
