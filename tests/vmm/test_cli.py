# SPDX-License-Identifier: Apache-2.0
"""What people mistype: one line on stderr, exit status 2, the field, the value and what is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.boot.kernel_images import elf, note, pvh_elf, pvh_note
from vmm.errors import ConfigError
from vmm.kvm import vm as kvm_module
from vmm.kvm.vm import Kvm, software_kvm


def pyvmm(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", "vmm", *arguments], capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL, **options,
    )  # fmt: skip


def complaint(*arguments: str, **options: object) -> str:
    done = pyvmm(*arguments, **options)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "tiny.elf"
    path.write_bytes(pvh_elf(bytes((0xB0, 0, 0xE6, 0xF4))))
    return str(path)


@pytest.mark.parametrize("what", ["kernel", "rootfs", "initrd"])
@pytest.mark.parametrize("state", ["missing", "empty", "directory", "below a file"])
def test_files_that_are_no_files(tmp_path: Path, kernel: str, what: str, state: str) -> None:
    path = tmp_path / "it"
    if state == "empty":
        path.touch()
    elif state == "directory":
        path.mkdir()
    elif state == "below a file":
        path = Path(kernel) / "it"
    arguments = {
        "kernel": [str(path)],
        "rootfs": [kernel, str(path)],
        "initrd": [kernel, "--initrd", str(path)],
    }[what]
    said = complaint("run", *arguments)
    assert str(path) in said


def test_unreadable_kernel(tmp_path: Path) -> None:
    # Root reads everything, so somebody else tries.
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o755)
    path = directory / "kernel"
    path.write_bytes(pvh_elf())
    path.chmod(0o600)
    for parent in path.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    code = "import os, sys; os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"
    # Imported before it lets go of root: the checkout may be root's alone.
    code = "import vmm.commands.run, vmm.machine.machine, vmm.errors; from vmm.commands.cli import main; " + code
    done = subprocess.run([sys.executable, "-c", code, "run", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert str(path) in done.stderr and "ermi" in done.stderr


def test_wrong_architecture(tmp_path: Path) -> None:
    path = tmp_path / "arm64.elf"
    path.write_bytes(elf([], machine=183))
    assert str(path) in complaint("run", str(path))


def test_truncated_kernel(tmp_path: Path, kernel: str) -> None:
    whole = Path(kernel).read_bytes()
    path = tmp_path / "short.elf"
    for length in (3, 20, 63, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert str(path) in complaint("run", str(path))


def test_initrd_that_does_not_fit(tmp_path: Path, kernel: str) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(64 << 20)
    said = complaint("run", kernel, "--initrd", str(initrd), "--memory", "32M")
    assert str(initrd) in said and "fit" in said


def test_command_line_too_long(kernel: str) -> None:
    assert "2047" in complaint("run", kernel, "--cmdline", "x" * 3000)


@pytest.mark.parametrize("memory", ["0", "-1", "1K", "lots", "1000T", ""])
def test_memory(kernel: str, memory: str) -> None:
    said = complaint("run", kernel, f"--memory={memory}")
    assert "memory" in said


@pytest.mark.parametrize("cpus", ["0", "-1", "65", "x", "1.5"])
def test_cpus(kernel: str, cpus: str) -> None:
    said = complaint("run", kernel, f"--cpus={cpus}")
    assert "cpus" in said and cpus in said


def test_disk_of_an_odd_size(tmp_path: Path, kernel: str) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(513))
    said = complaint("run", kernel, "--disk", str(disk))
    assert str(disk) in said and "512" in said


def test_unknown_disk_option(kernel: str) -> None:
    assert "allowed: ro" in complaint("run", kernel, "--disk", "x,rw")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--kvm", "/nonexistent"), "--lab"),
        (("--kvm", "/dev/null"), "is not a KVM device"),
        (("--console", "tty"), "must be stdio, raw, none, file:PATH or unix:PATH"),
        (("--console", "file:/nonexistent/x"), "cannot be written"),
        (("--protocol", "efi"), "linux64"),
        (("--unpack", "sometimes"), "never"),
        (("--what",), "--what"),
        (("--cmdline", "a", "--append", "b"), "--cmdline"),
    ],
)
def test_options(kernel: str, arguments: tuple[str, ...], problem: str) -> None:
    assert problem in complaint("run", kernel, *arguments)


def test_kvm_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm_module, "kvm_ioctl", lambda fd, request, argument=0: 11)
    with pytest.raises(ConfigError, match="has API version 11; pyvmm needs 12"):
        Kvm("/dev/null")


def test_kvm_without_a_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm_module, "kvm_ioctl", lambda fd, request, argument=0: 0 if argument == 32 else 12)
    assert Kvm("/dev/null").lacking() == ["KVM_CAP_IRQFD"]


def test_unknown_command_and_image() -> None:
    assert "allowed: run, serve, jailer, pull, config, ctl, link, prepare, vsock, check, lab" in complaint("fly")
    assert "allowed: run, serve, jailer, pull, config, ctl, link, prepare, vsock, check, lab" in complaint(
        "fly", "away"
    )
    assert "nosuchimage" in complaint("run", "nosuchimage")
    assert complaint("fly\naway").startswith("pyvmm: fly\\naway is not a command")
    assert complaint("ps", "a\x1b[2Jb\n").startswith("pyvmm ps: unrecognized arguments: a\\x1b[2Jb\\n (")
    assert complaint("run").startswith("pyvmm run: ")


def test_image_that_is_not_pulled_yet(tmp_path: Path) -> None:
    said = complaint("run", "debian", env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    assert "pyvmm pull debian" in said


def _linux(tmp_path: Path, *more: bytes) -> str:
    """A tiny guest that calls itself Linux; ends with 7."""
    if software_kvm() is None:
        pytest.skip("this host's KVM is the hardware's")
    path = tmp_path / "vmlinux"
    notes = pvh_note() + note(b"Linux", 0x101, b"6.1\0") + b"".join(more)
    path.write_bytes(pvh_elf(bytes((0xB0, 7, 0xE6, 0xF4)), notes=notes))
    return str(path)


def test_linux_on_a_software_kvm_names_the_lab(tmp_path: Path) -> None:
    said = complaint("run", _linux(tmp_path))
    assert "--lab" in said and "--any-kernel" in said


def test_linux_on_a_software_kvm_runs_if_asked_or_if_it_says_that_it_can(tmp_path: Path) -> None:
    assert pyvmm("run", "--any-kernel", _linux(tmp_path)).returncode == 7
    assert pyvmm("run", _linux(tmp_path, note(b"pyvmm", 1, b"\1\0\0\0"))).returncode == 7


def test_help_and_version() -> None:
    assert pyvmm("--version").stdout.startswith("pyvmm 0.")
    assert "run" in pyvmm("--help").stdout
    for command in ("run", "pull", "check", "lab"):
        assert pyvmm(command, "--help").returncode == 0
