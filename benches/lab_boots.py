# SPDX-License-Identifier: Apache-2.0
"""Count the guests that stop dead in the lab, for each QEMU that emulates the lab.

    python -m benches.lab_boots --boots 100             # QEMU of this host and the lab's own choice, in turn
    python -m benches.lab_boots --boots 100 --linux     # Debian's kernel and initramfs instead of the sleeper
    python -m benches.lab_boots --boots 100 --keep F    # each boot is a line in F; stopped, it goes on from there
    python -m benches.lab_boots --boots 20 --qemu newest --scenario queues      # one of tests.linux.scenarios
    python -m benches.lab_boots --boots 4 --qemu newest --on 0   # guests on CPU 0, and on CPU 1 FXRSTOR all the time

In turn each QEMU boots the lab, and in it guests one after another. The sleeper (lab_sleeper.S) sets a timer and
executes `sti; hlt` some thousand times; the Linux sleeps 300 times. A guest that takes no CPU time for so long before
its end has stopped dead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from vmm import images, lab
from vmm.errors import VmmError

ROOT = Path(__file__).parents[1]
IN_ONE_LAB = 20
STILL, PATIENCE = 10.0, 120.0
TURNS = 2000
END = 7  # a guest's own status
RESTORE = """static char area[512] __attribute__((aligned(16)));
int main(void) { __asm__("fxsave %0" : "=m"(area)); for (;;) __asm__ volatile("fxrstor %0" : : "m"(area)); }
"""
BESIDE = 'taskset -c 1 "$0" & cpu=$1; shift; taskset -c "$cpu" "$@"; status=$?; kill $!; exit $status'
SLEEPS = f"i=0; while [ $i -lt 300 ]; do read -t 0.002 x; i=$((i+1)); done; exit {END}"


def sleeper(directory: str) -> str:
    """Build the guest that only sleeps; return its path."""
    source, made, guest = ROOT / "benches/lab_sleeper.S", f"{directory}/sleeper.o", f"{directory}/sleeper"
    subprocess.run(["cc", "-m32", "-c", f"-DTURNS={TURNS}", str(source), "-o", made], check=True)
    link = ["ld", "-m", "elf_i386", "-N", "-e", "start", "--no-warn-rwx-segments", "-Ttext", "0x101000"]
    subprocess.run([*link, "--section-start=.note.pvh=0x100000", "-o", guest, made], check=True)
    return guest


def bound(directory: str, cpu: int) -> list[str]:
    """The start of a command line that runs on that CPU while CPU 1 only restores its FPU."""
    source, made = Path(directory, "restore.c"), f"{directory}/restore"
    source.write_text(RESTORE)
    subprocess.run(["cc", "-O1", "-static", str(source), "-o", made], check=True)
    return ["sh", "-c", BESIDE, made, str(cpu)]


def inside(boots: int, run: list[str]) -> None:
    """Boot guests; print a line of JSON for each."""
    for _ in range(boots):
        start = time.monotonic()
        command = [sys.executable, "-m", "vmm", "run", *run]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as process:  # type: ignore[call-overload]
            end = _end(process)
        print(json.dumps({"end": end, "seconds": round(time.monotonic() - start, 1)}), flush=True)


def scenario(boots: int, name: str) -> None:
    """Run a Linux scenario `boots` times; print a line of JSON for each."""
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(boots):
            start = time.monotonic()
            command = [sys.executable, "-m", "tests.linux.scenarios", directory, name]
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
            status = json.loads(Path(directory, f"{name}.json").read_text())["status"]
            end = {0: "ended", 124: "stopped dead"}.get(status, f"status {status}")
            print(json.dumps({"end": end, "seconds": round(time.monotonic() - start, 1)}), flush=True)


def _end(process: subprocess.Popen[bytes]) -> str:
    ticks, since, start = -1, time.monotonic(), time.monotonic()
    while True:
        try:
            status = process.wait(1)
            return "ended" if status == END else f"status {status}"
        except subprocess.TimeoutExpired:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        now, used = time.monotonic(), int(fields[11]) + int(fields[12])
        if used != ticks:
            ticks, since = used, now
        if now - since > STILL or now - start > PATIENCE:
            process.kill()
            return "stopped dead" if now - since > STILL else f"not ended after {PATIENCE:g} s"


def batch(qemu: str | None, boots: int, run: list[str], before: list[str]) -> list[dict[str, object]]:
    """Boot `boots` guests in one boot of the lab. If the lab itself fails, that is one more line."""
    command = [*before, "env", "-C", str(ROOT), sys.executable, "-m", "benches.lab_boots", "--inside", str(boots), *run]
    with tempfile.TemporaryFile() as out:
        start = time.monotonic()
        try:
            status = lab.run(command, timeout=60 + boots * PATIENCE, stdin=None, stdout=out.fileno(), qemu=qemu)
            end = "ended" if status == 0 else f"lab: status {status}"
        except VmmError as error:
            end = f"lab: {str(error).splitlines()[0]}"
        out.seek(0)
        lines = [json.loads(line) for line in out.read().splitlines() if line.startswith(b"{")]
    found = dict(Counter(str(one["end"]) for one in lines))
    print(f"{qemu or 'newest'}: {found}, {end}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return lines if end == "ended" else [*lines, {"end": end}]


def main() -> int:
    """Boot, count, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boots", type=int, default=100, help="guests for each QEMU (default: 100)")
    parser.add_argument("--qemu", action="append", help="a QEMU; newest for the lab's own choice (default: both)")
    parser.add_argument("--linux", action="store_true", help="guests that are Debian's Linux")
    parser.add_argument("--scenario", metavar="NAME", help="guests of that scenario of tests.linux.scenarios")
    parser.add_argument("--on", type=int, metavar="CPU", help="bind guests to that CPU, FXRSTOR on CPU 1 all the time")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add each boot to this file; those in it count")
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        boots, *run = args.inside
        scenario(int(boots), run[1]) if run[0] == "--scenario" else inside(int(boots), run)
        return 0
    ends: dict[str, list[dict[str, object]]] = {name: [] for name in args.qemu or ("qemu-system-x86_64", "newest")}
    if args.keep and args.keep.exists():
        for line in args.keep.read_text().splitlines():
            boot = json.loads(line)
            ends.setdefault(boot.pop("qemu"), []).append(boot)
    with tempfile.TemporaryDirectory() as directory:
        before = [] if args.on is None else bound(directory, args.on)
        if args.scenario:
            images.pull("busybox")
            run = ["--scenario", args.scenario]
        elif args.linux:
            image = images.resolve("debian") or images.pull("busybox")
            append = f'quiet panic=-1 -- sh -c "{SLEEPS}"'
            run = [image.kernel, "--initrd", image.initrd, "--memory", "256M", "--append", append]
        else:
            run = [sleeper(directory)]
        while short := [name for name, found in ends.items() if len(found) < args.boots]:
            for name in short:
                boots = min(IN_ONE_LAB, args.boots - len(ends[name]))
                found = batch(None if name == "newest" else name, boots, run, before)
                ends[name] += found
                if args.keep:
                    with args.keep.open("a") as kept:
                        kept.writelines(json.dumps({"qemu": name, **boot}) + "\n" for boot in found)
    for name, found in ends.items():
        took = sorted(float(str(one["seconds"])) for one in found if one["end"] == "ended")
        median = f"median {took[len(took) // 2]} s" if took else ""
        print(name, dict(Counter(str(one["end"]) for one in found)), median, f"load {os.getloadavg()[0]:.1f}", sep="; ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
