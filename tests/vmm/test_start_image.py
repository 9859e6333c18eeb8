# SPDX-License-Identifier: Apache-2.0
"""`pyvmm prepare` and the starts from what it saves: they are as any start, and none is from an image that is stale.

The oracle is the interpreter: what it says and how the kernel describes its process, with PYVMM_START=cold.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from vmm.commands import link, prepare

ROOT = Path(__file__).parents[2]
PATIENCE = 60
SYS_USERFAULTFD = 323
Done = subprocess.CompletedProcess[bytes]


class Program:
    """A private copy of pyvmm with its launcher, which the tests may change."""

    def __init__(self, directory: Path) -> None:
        self.packages, self.path = directory / "packages", directory / "pyvmm"
        for room in ("boot", "devices", "virtio", "vmm"):
            shutil.copytree(
                ROOT / room, self.packages / room, ignore=shutil.ignore_patterns("*.c", "*.pyx", "*.image*")
            )
        places = ":".join((str(self.packages), *link.import_path()[1:]))
        tail = b"%b\0%b\0" % (os.fsencode(sys.executable), os.fsencode(places))
        installed = Path(sys.executable).with_name("pyvmm").read_bytes()
        self.path.write_bytes(installed + tail + b"%08x" % len(tail) + link.MAGIC)
        self.path.chmod(0o755)
        self.image = self.packages / Path(prepare.image_path()).relative_to(ROOT)

    def run(self, *words: str | bytes, how: str = "warm", env: dict[str, str] | None = None, **options: Any) -> Done:
        """A start that is over; `how`: PYVMM_START."""
        environment = {**os.environ, **(env or {}), "PYVMM_START": how}
        while True:
            done: Done = subprocess.run(
                [self.path, *words], env=environment, capture_output=True, timeout=PATIENCE, **options
            )
            # The kernel's own choice of addresses: once in a thousand starts one is taken.
            if b"is in use where the image has its own" not in done.stderr:
                return done

    def problem(self, **options: str) -> str:
        """Why a start is not from the image; with an interpreter it is possible in any case."""
        assert self.run("--version", how="default", env=options).stdout.startswith(b"pyvmm ")
        done = self.run("--version", env=options)
        assert done.returncode == 1 and not done.stdout
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("pyvmm: PYVMM_START warm: ")
        return line.partition("warm: ")[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def prepared(program: Program) -> Program:
    if program.run("--version").returncode:  # or the test before left a good one
        # As by nohup: what is ignored here need not be where it goes on.
        done = program.run("prepare", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        assert (done.returncode, done.stdout.decode().strip(), done.stderr) == (0, str(program.image), b"")
    return program


LINES: dict[str, list[str | bytes]] = {
    "version": ["--version"],
    "help": ["--help"],
    "help of one": ["run", "--help"],
    "no command": ["fly"],
    "no kernel": ["run", "/nowhere/vmlinux"],
    "no such memory": ["run", "/nowhere/vmlinux", "--memory", "much"],
    "not UTF-8": ["run", b"/nowhere/\xff"],
    "not an option": ["serve", "--speed"],
    "configuration": ["config", "show"],
    "help of another": ["ps", "--help"],
}


@pytest.mark.parametrize("words", LINES.values(), ids=LINES)
def test_it_says_what_an_interpreter_says(prepared: Program, words: list[str | bytes], tmp_path: Path) -> None:
    (tmp_path / "pyvmm").mkdir()
    (tmp_path / "pyvmm" / "config.toml").write_text('[run]\nmemory = "640M"\n')
    for env in ({"XDG_CONFIG_HOME": str(tmp_path), "LC_ALL": "C"}, {"COLUMNS": "60", "LANG": "en_US.UTF-8"}):
        warm, cold = (prepared.run(*words, how=how, env=env) for how in ("warm", "cold"))
        assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_standard_descriptor_may_be_closed(prepared: Program, closed: int) -> None:
    words = ["sh", "-c", f'exec {closed}>&-; exec "$0" config show', str(prepared.path)]
    said = []
    for how in ("warm", "cold"):
        done = subprocess.run(words, env={**os.environ, "PYVMM_START": how}, capture_output=True, timeout=PATIENCE)
        said.append((done.returncode, done.stdout, done.stderr))
    assert said[0] == said[1]


def userfaultfd_allowed() -> bool:
    """Whether userfaultfd(2) with UFFD_USER_MODE_ONLY is there; a container may forbid it."""
    libc = ctypes.CDLL(None)
    fd: int = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | 1)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


class Served:
    """A `pyvmm serve` with its API up."""

    def __init__(self, program: Program, how: str, directory: Path, **env: str) -> None:
        self.socket, self.log = directory / f"{how}.sock", directory / f"{how}.log"
        self.log.touch()
        words = [str(program.path), "serve", "--api-sock", str(self.socket), "--log-path", str(self.log)]
        self.process = subprocess.Popen(
            words, env={**os.environ, **env, "PYVMM_START": how}, stdin=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        )  # fmt: skip
        self.words, self.proc = words, Path("/proc", str(self.process.pid))
        until(self.socket.exists, self.process.poll)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.socket))
            client.sendall(b"GET /version HTTP/1.1\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        until(lambda: "seccomp" in self.signals() and self.signals()["seccomp"] == "2")

    def signals(self) -> dict[str, str]:
        rows = (line.split(":", 1) for line in (self.proc / "status").read_text().splitlines())
        return {key.lower(): value.strip() for key, value in rows}

    def files(self) -> list[str]:
        """What its descriptors are, but for numbers of pipes and sockets."""
        found = []
        for fd in (self.proc / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(re.sub(r":\[\d+\]$", "", os.readlink(fd)))
        return sorted(found)

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0


@pytest.fixture
def both(prepared: Program, tmp_path: Path) -> Iterator[list[Served]]:
    served = [Served(prepared, how, tmp_path, TZ="<+14>-14") for how in ("warm", "cold")]
    yield served
    for one in served:
        one.process.kill()
        one.process.wait()


def test_only_what_is_touched_of_the_image_is_mapped(prepared: Program, both: list[Served]) -> None:
    warm, _ = both
    if "anon_inode:[userfaultfd]" not in warm.files():
        assert tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (6, 7) or not userfaultfd_allowed()
        return
    pages: list[int] = []
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", (warm.proc / "smaps").read_text()):
        if str(prepared.image) in mapping:
            assert re.search(r"^VmFlags:.* uw", mapping, re.MULTILINE), mapping
            size, resident = (int(re.findall(rf"^{key}: +(\d+)", mapping, re.MULTILINE)[0]) for key in ("Size", "Rss"))
            pages += [size, resident]
    assert sum(pages[1::2]) < sum(pages[::2]) * 2 / 3


def test_the_kernel_sees_the_same_process(both: list[Served], tmp_path: Path) -> None:
    warm, cold = both
    # The main thread goes to sleep a moment after the filters are there.
    names = ("ppid", "uid", "sigign", "sigcgt", "sigblk", "nonewprivs", "seccomp", "capeff", "umask", "name")
    until(lambda: all(one.signals()["sigblk"] == "0" * 16 for one in both))
    assert {name: warm.signals()[name] for name in names} == {name: cold.signals()[name] for name in names}
    assert int(warm.signals()["sigign"], 16) & 1 << signal.SIGUSR1 - 1, "it was ignored, and stays so"
    # One descriptor more, where the kernel has them, has the image's pages mapped one by one.
    ours = "anon_inode:[userfaultfd]"
    until(lambda: [name for name in warm.files() if name != ours] == [n.replace("cold", "warm") for n in cold.files()])
    assert (warm.proc / "limits").read_text() == (cold.proc / "limits").read_text()
    assert (warm.proc / "cgroup").read_text() == (cold.proc / "cgroup").read_text()
    assert (warm.proc / "cmdline").read_bytes() == b"".join(word.encode() + b"\0" for word in warm.words)
    for one in both:
        at = datetime.datetime.fromisoformat(one.log.read_text().split(" ", 1)[0]).replace(tzinfo=None)
        there = datetime.datetime.now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(hours=14)
        assert abs(there - at) < datetime.timedelta(hours=1), "by the time zone of its own environment"
        one.close()


def test_interrupts_and_ends(prepared: Program, tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        served = Served(prepared, "warm", tmp_path)
        served.process.send_signal(number)
        assert served.process.wait(PATIENCE) == 0
        assert not served.socket.exists()


@contextlib.contextmanager
def extended(file: Path, code: str) -> Iterator[None]:
    source = file.read_text()
    file.write_text(f"{source}\n\n{code}\n")
    try:
        yield
    finally:
        file.write_text(source)


def checking(program: Program, code: str) -> contextlib.AbstractContextManager[None]:
    """`pyvmm check` executes `code` in place of what it does."""
    return extended(
        program.packages / "vmm" / "commands" / "check.py", f"def main(args):\n    exec({code!r}, {{}})\n    return 0"
    )


def imported(program: Program, code: str) -> contextlib.AbstractContextManager[None]:
    """A module that is in any image executes `code` when it is imported."""
    return extended(program.packages / "boot" / "layout.py", code)


def test_children_of_it_have_its_environment(prepared: Program, tmp_path: Path) -> None:
    # The pager, editor or ssh that a command starts: by os.environ and by the C library's own.
    code = (
        "import os, subprocess, sys; os.environ['B'] = '2'; "
        "print(subprocess.check_output(['env']).decode().count('A=1'), os.environ['A'], os.environ.get('LC_ALL'))"
    )
    with checking(prepared, code):
        assert prepared.run("prepare").returncode == 0
        env = {"A": "1"}
        done = prepared.run("check", env=env)
        assert done.stdout == prepared.run("check", how="cold", env=env).stdout and done.stdout.startswith(b"1 1 ")


def test_its_children_have_other_random_numbers(prepared: Program) -> None:
    # The C library's state for them is in a mapping that the kernel empties in a child; so is this one.
    state = "import mmap\nSTATE = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE)\nSTATE.madvise(18)  # MADV_WIPEONFORK"
    code = (
        "import os, sys; from boot.layout import STATE; STATE[:2] = b'no'; os.urandom(1); reads, writes = os.pipe()\n"
        "if not os.fork(): os.write(writes, STATE[:2] + os.urandom(16)); os._exit(0)\n"
        "said = os.read(reads, 18); print(said[:2] == bytes(2), said[2:] != os.urandom(16), STATE[:2])"
    )
    with imported(prepared, state), checking(prepared, code):
        assert prepared.run("prepare").returncode == 0
        assert prepared.run("check").stdout == b"True True b'no'\n"


def test_a_library_keeps_its_descriptor(prepared: Program) -> None:
    # As libffi does, which is mapped in any image; here a library of ours.
    opens = "import os\nfrom vmm import _bus\nFD = os.open(_bus.__file__, os.O_RDONLY)"
    code = (
        "import fcntl, os; from boot.layout import FD; from vmm import _bus; "
        "print(FD, os.path.samestat(os.fstat(FD), os.stat(_bus.__file__)), fcntl.fcntl(FD, fcntl.F_GETFD))"
    )
    with imported(prepared, opens), checking(prepared, code):
        assert prepared.run("prepare").returncode == 0
        done = prepared.run("check")
        assert done.stdout.split()[1:] == [b"True", b"1"]
        number = int(done.stdout.split()[0])
        done = prepared.run("--version", close_fds=False, preexec_fn=lambda: os.dup2(1, number))
        assert b"has a descriptor in the image whose number is in use" in done.stderr
        limits = number, number
        done = prepared.run("--version", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
        assert b"has a descriptor in the image above the limit of open files" in done.stderr


def test_callbacks_without_end(prepared: Program) -> None:
    # libffi maps its file again for each hundred.
    code = (
        "from ctypes import *; made = [CFUNCTYPE(c_int, c_int)(lambda x, i=i: x + i) for i in range(1000)]; "
        "print(sum(each(1) for each in made))"
    )
    with checking(prepared, code):
        assert prepared.run("prepare").returncode == 0
        assert prepared.run("check").stdout == b"500500\n"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()", "with 2 threads"),
        ("import os\nFD = os.open('/dev/zero', os.O_RDONLY)", r"whose descriptor 20\d is /dev/zero"),
        (
            "import os\nfrom vmm import _bus\nFD = os.open(_bus.__file__, os.O_RDWR)",
            r"whose descriptor 20\d is /.*_bus.*\.so",
        ),
    ],
    ids=["thread", "descriptor", "to write"],
)
def test_what_cannot_be_saved_is_named(prepared: Program, code: str, what: str) -> None:
    with imported(prepared, code):
        done = prepared.run("prepare")
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = done.stderr.decode().splitlines()
    expected = f"pyvmm prepare: starts stay as they are: copy a process {what}: Device or resource busy"
    assert re.fullmatch(expected, line)


def test_a_deep_recursion_is_an_error_of_python(prepared: Program) -> None:
    # However far the stack could grow where the image was made.
    code = "x = []\nfor _ in range(10**6): x = [x]\ntry: repr(x)\nexcept RecursionError: print('deep')"
    with checking(prepared, code):
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        done = prepared.run("prepare", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (hard, hard)))
        assert done.returncode == 0
        done = prepared.run("check")
        assert (done.returncode, done.stdout) == (0, b"deep\n")


def test_twenty_at_once(prepared: Program) -> None:
    all_of_them = [
        subprocess.Popen([prepared.path, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(20)
    ]
    said = [(*one.communicate(timeout=PATIENCE), one.returncode) for one in all_of_them]
    assert len(set(said)) == 1 and said[0][0].startswith(b"pyvmm ")


def test_what_it_is_not_used_for(prepared: Program) -> None:
    assert "is a locale without UTF-8" in prepared.problem(LC_ALL="de_DE.ISO-8859-1")
    assert "asks for something" in prepared.problem(LD_LIBRARY_PATH="/nowhere")
    assert "asks for something" in prepared.problem(GLIBC_TUNABLES="glibc.malloc.arena_max=1")


def test_what_has_changed_is_not_started(prepared: Program) -> None:
    (library,) = (prepared.packages / "vmm").glob("_bus.*.so")  # that is mapped, and one that was imported
    for source in (prepared.packages / "vmm" / "errors.py", library):
        os.utime(source, ns=(1, 1))
        assert prepared.problem() == f"{source} has changed since `pyvmm prepare`"
        assert prepared.run("prepare").returncode == 0
        assert prepared.run("--version").returncode == 0


def test_what_is_damaged_is_not_started(prepared: Program) -> None:
    whole = prepared.image.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole + b"\0", b"X" + whole[1:], whole[:16] + b"\1" + whole[17:]):
        prepared.image.write_bytes(damaged)
        assert "is damaged" in prepared.problem()
    prepared.image.write_bytes(whole)
    prepared.image.chmod(0o664)
    assert "others may write it" in prepared.problem()


def test_an_image_of_another_cpu_or_kernel_is_not_started(prepared: Program) -> None:
    whole = prepared.image.read_bytes()
    prepared.image.write_bytes(whole[:80] + bytes(each ^ 255 for each in whole[80:88]) + whole[88:])
    assert "was made on another CPU" in prepared.problem()
    prepared.image.write_bytes(whole[:-4096] + bytes(4096))  # the vDSO's code is at the end
    assert prepared.problem() == "the kernel is another one than that of `pyvmm prepare`"


def test_without_an_image(prepared: Program) -> None:
    for _ in range(2):
        done = prepared.run("prepare", "--remove")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert prepared.problem() == f"{prepared.image} there is none; `pyvmm prepare` makes it"


def test_an_image_that_cannot_be_written_costs_one_line(prepared: Program) -> None:
    before = sorted(prepared.image.parent.iterdir())
    limit = 1 << 20
    done = prepared.run("prepare", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("pyvmm prepare: starts stay as they are: ") and "File too large" in line
    assert sorted(prepared.image.parent.iterdir()) == before and prepared.run("--version").returncode == 0
