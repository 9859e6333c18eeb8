# SPDX-License-Identifier: Apache-2.0
"""What the host refuses is said in one line, by every command: no traceback, no stray file, a status of failure."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kvm.guests import write_guest
from vmm.commands.cli import main
from vmm.errors import host_problem

NOBODY = 54321  # in no password file
PROGRAM = "import sys; from vmm.commands.cli import entry; sys.exit(entry())"
# A user without a name, who may read our sources wherever they are, and for whom limits hold.
AS_NOBODY = f"""
import ctypes, os
libc = ctypes.CDLL(None)
libc.prctl(28, 4, 0, 0, 0)  # PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP: what is kept is said below
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
libc.capset((ctypes.c_uint32 * 2)(0x2008_0522, 0), (ctypes.c_uint32 * 6)(6, 6))  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
"""
QUIT = "mov al, 0xfe; out 0x64, al; 1: hlt; jmp 1b"
COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "run": ["run", "kernel", "--memory", "4M", "--any-kernel"],
    "run a name": ["run", "nosuchimage"],
    "run --dry-run": ["run", "kernel", "--memory", "4M", "--dry-run"],
    "run --write-config": ["run", "kernel", "--write-config", "written"],
    "run --help": ["run", "--help"],
    "serve": ["serve", "--no-api", "--config-file", "config.json"],
    "serve a socket": ["serve", "--api-sock", "no/s"],
    "serve nothing": ["serve", "--api-sock", ""],
    "serve --version": ["serve", "--version"],
    "check": ["check"],
    "ctl": ["ctl", "--api-sock", "no/s", "status"],
    "link": ["link", "firecracker", "."],
    "vsock": ["vsock", "no/v", "1"],
    "ps": ["ps"],
    "exec": ["exec", "nosuchname", "true"],
    "cp": ["cp", "nosuchname:/a", "b"],
    "sandbox": ["sandbox", "nosuchimage", "true"],
    "pull --list": ["pull", "--list"],
    "jailer": ["jailer", "--id", "a", "--exec-file", "x", "--uid", "0", "--gid", "0"],
}


@pytest.fixture
def room(tmp_path: Path) -> Path:
    directory = tmp_path / "room"
    directory.mkdir()
    os.rename(write_guest(tmp_path, QUIT), directory / "kernel")
    config = '{"boot-source": {"kernel_image_path": "kernel"}, "drives": [],'
    (directory / "config.json").write_text(f'{config} "machine-config": {{"vcpu_count": 1, "mem_size_mib": 8}}}}')
    for path in (directory, *directory.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/") and str(path).startswith("/tmp/"):
            path.chmod(0o777)
    return directory


# What comes before the program, and HOME.
HOSTS = {
    "no home, no passwd entry": (AS_NOBODY, None),
    "home is read-only": ("", "/proc"),
    "empty home": ("", ""),
    "8 descriptors": ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))\n", "/root"),
    "one process": (AS_NOBODY + "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n", "/tmp"),
    "full": ("", "/root"),
}


def command_and_environment(host: str, words: list[str]) -> dict[str, Any]:
    before, home = HOSTS[host]
    if os.getuid() and before.startswith(AS_NOBODY):
        pytest.fail("LAYER MISSING: host errors: becoming another user takes root", pytrace=False)
    environment = {name: value for name, value in os.environ.items() if name != "HOME" and not name.startswith("XDG_")}
    return {
        "args": [sys.executable, "-c", before + PROGRAM, *words],
        "env": environment if home is None else {**environment, "HOME": home},
        "stdin": subprocess.DEVNULL,
        "timeout": 60,
    }


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_line(room: Path, host: str, command: str) -> None:
    before = set(os.listdir(room))
    with open("/dev/full" if host == "full" else os.devnull, "wb") as sink:
        done = subprocess.run(
            **command_and_environment(host, COMMANDS[command]), cwd=room, stdout=sink, stderr=subprocess.PIPE
        )
    said = done.stderr.decode(errors="replace")
    assert ("Traceback" not in said and 0 <= done.returncode < 128) or done.returncode == 153, (done.returncode, said)
    if done.returncode:
        assert said.count("\n") <= 1, said
        assert said.startswith("pyvmm") or done.returncode != 1 or (command == "check" and not said), said
    if host == "full" and command in (
        "help",
        "version",
        "run --help",
        "run --dry-run",
        "serve --version",
        "check",
        "pull --list",
    ):
        assert done.returncode == 1 and "No space left on device" in said
    assert set(os.listdir(room)) - before <= {"written", "firecracker"}, "a directory named ~, or another"


@pytest.mark.parametrize("command", ["run", "serve", "serve a config by a socket"])
@pytest.mark.parametrize("most", [3, 4, 5])
def test_a_few_processes_are_enough_or_that_is_said(room: Path, most: int, command: str) -> None:
    # KVM may make threads, too, which are counted.
    words = COMMANDS.get(command) or ["serve", "--api-sock", "s", "--config-file", "config.json"]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NPROC, ({most}, {most}))\n"
    how = command_and_environment("no home, no passwd entry", words)
    how["args"][2] = AS_NOBODY + limit + PROGRAM
    done = subprocess.run(**how, cwd=room, capture_output=True, text=True)
    assert done.returncode in (0, 1, 80), done
    assert "Traceback" not in done.stderr and (done.returncode != 1 or done.stderr.count("\n") == 1), done.stderr


NO_LATER = (
    "import vmm.jail.preload\ndef fails(): raise ImportError('Too many open files')\n"
    "vmm.jail.preload.preload_later = fails\n"
)
NO_VM = (
    "import vmm.api.actions\ndef fails(self): raise OSError(24, 'Too many open files')\n"
    "vmm.api.actions.Vmm.prepare = fails\n"
)


@pytest.mark.parametrize("socket", [["--no-api"], ["--api-sock", "s"]])
@pytest.mark.parametrize("fails", [NO_LATER, NO_VM], ids=["after the filters", "before the filters"])
def test_a_start_that_fails_waits_for_no_thread(room: Path, fails: str, socket: list[str]) -> None:
    # Whoever wants a thread waits until filters are there, which then will never be.
    words = ["serve", *socket, "--config-file", "config.json"]
    done = subprocess.run(
        [sys.executable, "-c", fails + PROGRAM, *words], cwd=room, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "pyvmm serve: Too many open files\n")
    assert not (room / "s").exists()


def test_a_name_that_is_not_utf_8(room: Path) -> None:
    name = os.fsdecode(b"k\xff")
    os.rename(room / "kernel", room / name)
    for options, status in ((["--dry-run"], 0), ([], 80), (["--write-config", "w"], 1), (["--console", "x\udcff"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "run", name, "--memory", "4M", "--any-kernel", *options], cwd=room,
            capture_output=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == status and b"Traceback" not in done.stderr, done.stderr
        if options == ["--dry-run"]:
            assert b"k\xff" in done.stdout
        elif status:
            assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("option", ["--log-path", "--metrics-path"])
def test_what_the_api_could_not_tell_is_refused_at_the_start(room: Path, option: str) -> None:
    (room / "w\udcff").touch()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "serve", "--api-sock", "s", option, "w\udcff"], cwd=room, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "pyvmm serve: 'w\\udcff' is not UTF-8, which is needed here\n")


# A runtime that has closed its end, and a disk that is full; the status, and a part of the log.
@pytest.mark.parametrize("where", ["/dev/full", "a closed pipe"])
@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["run", "kernel", "--memory", "4M", "--any-kernel"], 80, ""),
        (["run", "kernel", "--nonsense"], 2, ""),
        (["serve", "--log-path", "log", "--level", "loud"], 152, "--level loud: must be"),
        (["serve", "--log-path", "log", "--no-api"], 153, "--no-api: needs --config-file"),
        (["serve", "--log-path", "log", "--api-sock", "no/s"], 1, "--api-sock no/s: cannot be made"),
        (["serve", "--log-path", "log", "--metadata", "kernel"], 1, "--metadata kernel: An error occurred when"),
    ],
)
def test_standard_error_that_nobody_reads_changes_no_end(
    room: Path, words: list[str], status: int, told: str, where: str
) -> None:
    (room / "log").touch()
    reader, writer = os.pipe()
    os.close(reader)
    sink = os.open(where, os.O_WRONLY) if where.startswith("/") else writer
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=room, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=sink, timeout=60,
    )  # fmt: skip
    for fd in {sink, writer}:
        os.close(fd)
    assert done.returncode == status
    assert told in (room / "log").read_text()


def test_a_file_that_is_too_large_for_a_state_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory"
    path.touch()
    os.truncate(path, 1 << 42)
    assert main(["serve", "--describe-snapshot", str(path)]) == 1
    assert "is not a snapshot of pyvmm: it is too large" in capsys.readouterr().err


def test_a_configuration_that_cannot_be_written_is_what_it_was(room: Path) -> None:
    (room / "vm.json").write_text("mine")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    for name in ("vm.json", "new.json"):
        done = subprocess.run(
            [sys.executable, "-c", limit + PROGRAM, "run", "kernel", "--write-config", name], cwd=room, text=True,
            capture_output=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "File too large" in done.stderr, done.stderr
    assert (room / "vm.json").read_text() == "mine"
    assert sorted(os.listdir(room)) == ["config.json", "kernel", "vm.json"]


def test_nowhere_to_put_images_is_said(room: Path) -> None:
    for host, words in itertools.product(
        ("no home, no passwd entry", "empty home"), (["run", "debian"], ["pull", "busybox"])
    ):
        done = subprocess.run(**command_and_environment(host, words), cwd=room, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "HOME: is not set" in done.stderr, done.stderr
        assert not (room / "~").exists()


def test_a_copy_to_a_full_disk_names_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(bytes(10_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            shutil.copyfile(tmp_path / "from", tmp_path / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert host_problem(caught.value) == f"{tmp_path / 'to'}: File too large"
    with pytest.raises(OSError) as missing:
        shutil.copyfile(tmp_path / "none", tmp_path / "to")
    assert host_problem(missing.value) == f"{tmp_path / 'none'}: No such file or directory"
