# SPDX-License-Identifier: Apache-2.0
"""Check the statements about Firecracker and QEMU's microvm in README and docs/peers.md, each by a command.

    python -m benches.peers.claims          # seconds, on any /dev/kvm; status 1 if one is wrong

docs/peers.md has the list, and the sources for statements about other VMMs, which are not installed here.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benches.peers import common
from benches.peers.firecracker import firecracker, jailer
from benches.peers.launch import RESET
from tests.api.oracle import Process
from tests.boot.kernel_images import bzimage, compress, vmlinux
from vmm.testing import tiny_elf

PATIENCE = 20


class Claim(NamedTuple):
    """One cell of the table, or a part of it.

    :ivar check: what the peer showed; as ``expected`` where the claim holds
    """

    peer: str
    text: str
    check: Callable[[Path], str]
    expected: str


def _said(command: list[str], feed: str = "") -> str:
    done = subprocess.run(command, input=feed, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    return done.stdout + done.stderr


def _guest(directory: Path) -> Path:
    # tables.S as the smallest PVH guest
    made, code, guest = directory / "tables.o", directory / "tables.bin", directory / "tables"
    source = Path(__file__).with_name("tables.S")
    subprocess.run(["cc", "-m32", "-c", str(source), "-o", str(made)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(made), str(code)], check=True)
    guest.write_bytes(tiny_elf(code.read_bytes()))
    return guest


# --- Firecracker


def _fire_tables(directory: Path) -> str:
    log = directory / "log"
    log.touch()
    return _said([*common.firecracker_command(directory, _guest(directory)), "--log-path", str(log)]).strip()


def _fire_bzimage(directory: Path) -> str:
    kernel = directory / "bzImage"
    kernel.write_bytes(bzimage(compress("gzip", vmlinux())))
    said = _said(common.firecracker_command(directory, kernel))
    return "refused" if "Invalid Elf magic number" in said else said[-300:]


def _fire_pvh(directory: Path) -> str:
    # its e_entry halts for ever, so that only the note's entry ends it
    kernel = directory / "pvh"
    elf = bytearray(tiny_elf(RESET + b"\xf4\xeb\xfd"))
    elf[24:32] = ((1 << 20) + len(RESET)).to_bytes(8, "little")
    kernel.write_bytes(elf)
    done = subprocess.run(common.firecracker_command(directory, kernel), capture_output=True, timeout=PATIENCE)
    return f"status {done.returncode}"


def _fire_linux64(directory: Path) -> str:
    kernel = directory / "elf"
    elf = bytearray(tiny_elf(RESET))
    elf[64 + 56] = 0  # PT_NULL, which was PT_NOTE
    kernel.write_bytes(elf)
    done = subprocess.run(common.firecracker_command(directory, kernel), capture_output=True, timeout=PATIENCE)
    return f"status {done.returncode}"


def _fire_api(method: str, path: str, body: object) -> Callable[[Path], str]:
    def check(directory: Path) -> str:
        with Process([firecracker()], directory) as process:
            answer = process.request(method, path, body)
        text = answer.body.decode(errors="replace")
        return f"{answer.status} {text}".strip() if answer.status != 204 else "204"

    return check


def _fire_help(word: str, program: Callable[[], str] = firecracker) -> Callable[[Path], str]:
    return lambda directory: "yes" if word in _said([program(), "--help"]) else "no"


def _drive(directory: Path) -> str:
    (directory / "disk").write_bytes(bytes(1 << 20))
    limiter = {"bandwidth": {"size": 1 << 20, "refill_time": 100}}
    body = {
        "drive_id": "a", "path_on_host": "disk", "is_root_device": False, "io_engine": "Async", "rate_limiter": limiter,
    }  # fmt: skip
    return _fire_api("PUT", "/drives/a", body)(directory)


def _begins(check: Callable[[Path], str], *beginnings: str) -> Callable[[Path], str]:
    # of the answers that begin so, the beginning
    def short(directory: Path) -> str:
        found = check(directory)
        return next((begin for begin in beginnings if found.startswith(begin)), found)

    return short


# --- QEMU


def _qemu_tables(machine: str) -> Callable[[Path], str]:
    def check(directory: Path) -> str:
        exit_port = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")
        command = common.qemu_command(_guest(directory), "-serial", "stdio", *exit_port, machine=machine)
        return _said(command).split("\n")[0].strip() or "none"

    return check


def _qemu_has(device: str) -> Callable[[Path], str]:
    def check(directory: Path) -> str:
        argv = [common.QEMU, "-M", "microvm", "-accel", "tcg", "-display", "none", "-nodefaults", "-serial", "null"]
        return "yes" if f"dev: {device}," in _said([*argv, "-monitor", "stdio"], "info qtree\nquit\n") else "no"

    return check


def _qemu_offers(device: str) -> Callable[[Path], str]:
    return lambda directory: "yes" if f'name "{device}"' in _said([common.QEMU, "-device", "help"]) else "no"


def _qemu_network(directory: Path) -> str:
    said = _said([common.QEMU, "-netdev", "help"]).split()
    return ", ".join(name for name in ("tap", "user") if name in said)


def _qemu_cpus(directory: Path) -> str:
    said = _said([common.QEMU, "-M", "microvm", "-accel", "tcg", "-display", "none", "-nodefaults", "-smp", "9999"])
    return said.rpartition("'microvm' is ")[2].strip()


FIRE, QEMU = "Firecracker", "QEMU microvm"
FILES = {"snapshot_path": "s", "mem_file_path": "m"}
EARLY = '400 {"fault_message":"The requested operation is not supported before starting the microVM'
CLAIMS = (
    Claim(FIRE, "kernels: ELF with a PVH note is entered by it", _fire_pvh, "status 0"),
    Claim(FIRE, "kernels: ELF without a note by linux64", _fire_linux64, "status 0"),
    Claim(FIRE, "kernels: no bzImage", _fire_bzimage, "refused"),
    Claim(FIRE, "tables: ACPI and MP table", _fire_tables, "MA"),
    Claim(
        FIRE, "vCPUs: 32", _fire_api("PUT", "/machine-config", {"vcpu_count": 32, "mem_size_mib": 128}), "204"
    ),
    Claim(
        FIRE, "vCPUs: not 33",
        _begins(_fire_api("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 128}), "400"), "400",
    ),
    Claim(FIRE, "virtio transport: mmio, no PCI", _fire_help("--enable-pci"), "no"),
    Claim(FIRE, "virtio-blk: io_uring, rate limits", _drive, "204"),
    Claim(FIRE, "virtio-vsock: unix sockets", _fire_api("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v"}), "204"),
    Claim(FIRE, "virtio-fs: no", _begins(_fire_api("PUT", "/fs/a", {}), "400"), "400"),
    Claim(FIRE, "rng: yes", _fire_api("PUT", "/entropy", {}), "204"),
    Claim(
        FIRE, "balloon: yes", _fire_api("PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": False}), "204"
    ),
    Claim(
        FIRE, "balloon: no free page reporting",
        _begins(
            _fire_api(
                "PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": False, "free_page_reporting": True}
            ), "400",
        ), "400",
    ),
    Claim(FIRE, "metadata service: yes", _fire_api("PUT", "/mmds", {"a": "b"}), "204"),
    Claim(FIRE, "jail: a jailer", _fire_help("--chroot-base-dir", jailer), "yes"),
    Claim(FIRE, "seccomp: filters", _fire_help("--no-seccomp"), "yes"),
    Claim(FIRE, "snapshots: yes, when it runs", _begins(_fire_api("PUT", "/snapshot/create", FILES), EARLY), EARLY),
    Claim(QEMU, "tables: ACPI and MP table", _qemu_tables("microvm"), "MA"),
    Claim(QEMU, "tables: or MP table alone", _qemu_tables("microvm,acpi=off"), "M"),
    Claim(QEMU, "vCPUs: 288", _qemu_cpus, "288"),
    Claim(QEMU, "serial console: yes", _qemu_has("isa-serial"), "yes"),
    Claim(QEMU, "RTC: yes", _qemu_has("mc146818rtc"), "yes"),
    *(Claim(QEMU, f"{name}: not by itself", _qemu_has(name), "no") for name in ("i8042", "isa-debug-exit", "pvpanic")),
    *(Claim(QEMU, f"{name}: an option", _qemu_offers(name), "yes") for name in ("i8042", "isa-debug-exit", "pvpanic")),
    Claim(QEMU, "virtio transport: mmio", _qemu_has("virtio-mmio"), "yes"),
    Claim(QEMU, "network: tap, user", _qemu_network, "tap, user"),
    Claim(QEMU, "devices of your own: by vhost-user", _qemu_offers("vhost-user-i2c-device"), "yes"),
    Claim(QEMU, "virtio-vsock: vhost", _qemu_offers("vhost-vsock-device"), "yes"),
    Claim(QEMU, "virtio-fs: by virtiofsd", _qemu_offers("vhost-user-fs-device"), "yes"),
    *(
        Claim(QEMU, f"{name}: yes", _qemu_offers(f"virtio-{name}-device"), "yes")
        for name in ("blk", "net", "rng", "balloon", "serial")
    ),
)  # fmt: skip


def results() -> Iterator[tuple[Claim, str]]:
    """Each claim, and the result of its check."""
    for claim in CLAIMS:
        with tempfile.TemporaryDirectory(prefix="pyvmm-claim-") as directory:
            try:
                found = claim.check(Path(directory))
            except (OSError, subprocess.SubprocessError) as error:
                found = f"{type(error).__name__}: {error}"
        yield claim, found


def main() -> int:
    """Check all claims; return 0 if each holds."""
    common.need_kvm()
    start, wrong = time.monotonic(), 0
    for claim, found in results():
        holds = found == claim.expected
        wrong += not holds
        print(f"{'holds' if holds else 'WRONG'}  {claim.peer}: {claim.text}" + ("" if holds else f": {found!r}"))
    print(f"{len(CLAIMS)} claims, {wrong} wrong, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
