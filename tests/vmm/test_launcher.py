# SPDX-License-Identifier: Apache-2.0
"""The program pyvmm: what its launcher says and does by itself, and what it hands to Python."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

import vmm
from vmm.api import API_VERSION
from vmm.commands import cli, jailer, serve

ROOT = Path(__file__).parents[2]
PYVMM = Path(sys.executable).with_name("pyvmm")
COMMANDS = {"firecracker": serve, "jailer": jailer}
PATIENCE = 60


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("links")
    for name in COMMANDS:
        # Twice: the second one replaces the first.
        for _ in range(2):
            subprocess.run([PYVMM, "link", name, directory], check=True, capture_output=True, timeout=PATIENCE)
    return directory


def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=PATIENCE, **options)  # type: ignore[call-overload,no-any-return]


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)


def test_it_knows_the_options_of_serve() -> None:
    source = (ROOT / "vmm" / "launcher.c").read_text()
    words = {
        name: set(re.findall(r'"(--[\w-]+)"', source.partition(f"{name}[] = {{")[2].partition("}")[0]))
        for name in ("with_value", "switches")
    }
    # Those that forbid a socket, or that Python refuses, are Python's.
    left = {"--no-api", "--version", "--seccomp-filter", "--snapshot-version", "--describe-snapshot"}
    assert words["with_value"] | words["switches"] | left == {option for option, _, _, _ in serve.OPTIONS}
    assert words["switches"] == {option for option, metavar, _, _ in serve.OPTIONS if metavar is None} - left
    assert f'"{API_VERSION}"' in source and f'"{serve.DEFAULT_SOCKET}"' in source


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_it_says_itself_is_what_python_says(links: Path, name: str, option: str) -> None:
    own = run(links / name, option)
    program = [sys.executable, "-m", "vmm", cli.PROGRAMS[name], option]
    update = f"COLUMNS=80 .venv/bin/pyvmm {cli.PROGRAMS[name]} --help > vmm/commands/help/{name}.txt"
    assert own.stdout == run(*program, env={**os.environ, "COLUMNS": "80"}).stdout, update
    assert (own.returncode, own.stderr) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_link_is_a_file_of_its_own_name(links: Path, name: str) -> None:
    path = links / name
    assert os.path.realpath(path) == str(path) and path.is_file() and os.access(path, os.X_OK)
    jailer.check_program(str(path))


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "firecracker").write_text("precious")
    done = run(PYVMM, "link", "firecracker", tmp_path)
    assert done.returncode == 2 and "exists, and was not made by pyvmm link" in done.stderr
    assert (tmp_path / "firecracker").read_text() == "precious"


def test_one_process_from_the_exec_on(links: Path, tmp_path: Path) -> None:
    path, kept = tmp_path / "s", os.open("/dev/null", os.O_RDONLY)
    before = os.listdir("/proc/self/fd")
    process = subprocess.Popen([links / "firecracker", "--api-sock", path], pass_fds=[kept], stdin=subprocess.DEVNULL)
    try:
        wait_for(path, process)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))  # whoever sees the file can connect
            client.sendall(b"GET /version HTTP/1.1\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        proc = Path("/proc", str(process.pid))
        assert (proc / "comm").read_text() == "firecracker\n"
        assert f"\nPPid:\t{os.getpid()}\n" in (proc / "status").read_text()
        assert (proc / "fd" / str(kept)).exists() and len(before) > 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert not os.listdir(tmp_path), "nor is anything else left there"
    finally:
        process.kill()
        os.close(kept)


def test_a_dead_socket_makes_room_and_a_living_one_does_not(links: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    process = subprocess.Popen([links / "firecracker", "--api-sock", path])
    try:
        end = time.monotonic() + PATIENCE
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                if client.connect_ex(str(path)) == 0:
                    break
            assert time.monotonic() < end
        second = run(links / "firecracker", "--api-sock", path)
        assert second.returncode == 1 and "is in use by another program" in second.stderr
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "status"), [(["--id", "a/b"], 153), (["--nonsense"], 153), (["--http-api-max-payload-size", "x"], 153)]
)
def test_a_mistake_leaves_no_socket(links: Path, tmp_path: Path, words: list[str], status: int) -> None:
    done = run(links / "firecracker", "--api-sock", tmp_path / "s", *words)
    assert done.returncode == status and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", ["x" * 200, "/nonexistent/s"])
def test_a_path_that_cannot_be_is_said_by_python(links: Path, path: str) -> None:
    done = run(links / "firecracker", "--api-sock", path)
    assert done.returncode in (1, 153) and len(done.stderr.splitlines()) == 1


def test_closed_standard_streams_are_not_the_socket(links: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", links / "firecracker", "--api-sock", path])
    try:
        wait_for(path, process)
        for fd in range(3):
            assert os.readlink(f"/proc/{process.pid}/fd/{fd}") == "/dev/null"
    finally:
        process.kill()
        process.wait()


def test_python_starts_isolated_and_without_site(tmp_path: Path) -> None:
    (tmp_path / "vmm.py").write_text("raise SystemExit('imported from the current directory')")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('site was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONINSPECT": "1", "PYTHONHOME": "/nonexistent"}
    done = run(PYVMM, "check", "--help", cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stdout.startswith("usage: pyvmm check"), done.stderr


def test_as_pip_lays_it_out(tmp_path: Path) -> None:
    # PREFIX/bin/pyvmm and PREFIX/lib/pythonX.Y/site-packages; the interpreter, and what else is needed, elsewhere.
    packages = tmp_path / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    for room in ("vmm", "boot", "devices", "virtio"):
        (packages / room).symlink_to(ROOT / room)
    program = tmp_path / "bin" / "pyvmm"
    program.parent.mkdir()
    shutil.copy(PYVMM, program)
    path = {"PATH": f"{PYVMM.parent}:/usr/bin:/bin"}
    assert run(program, "--version", env=path).stdout == f"pyvmm {vmm.__version__}\n"
    # A dependency that is not there but where `site` finds it.
    done = run(program, "ctl", "--socket", tmp_path / "none", "status", env=path)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr.replace("ConfigError", ""), done.stderr
    nothing = run(program, "--version", env={"PATH": "/nonexistent"})
    assert nothing.returncode == 1 and "in PATH" in nothing.stderr and len(nothing.stderr.splitlines()) == 1


def test_the_first_questions_are_answered_and_counted_as_later_ones_are(links: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = subprocess.Popen([links / "firecracker", "--api-sock", path, "--id", "a-B9"])
    try:
        wait_for(path, process)
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        answers: dict[str, set[bytes]] = {"/": set(), "/version": set()}
        for turn in range(3):
            for question, heard in answers.items():
                client.sendall(f"GET {question} HTTP/1.1\r\n\r\n".encode())
                heard.add(client.recv(4096))
            time.sleep(turn / 2)  # the last ones are answered by what all others are
        assert all(len(heard) == 1 for heard in answers.values())
        client.sendall(b"GET /metrics/prometheus HTTP/1.1\r\n\r\n")
        counted = client.recv(1 << 20).decode()
        client.close()
    finally:
        process.kill()
        process.wait()
    assert "200" in counted.partition("\r\n")[0]
    assert re.search(r"instance_info_total 3", counted) and re.search(r"vmm_version_total 3", counted)


def test_msgspec_is_spared_beside_the_real_collections() -> None:
    # `typing` is imported with stand-ins, then somebody wants the real `collections`: msgspec needs its `abc`.
    code = f"""
import gc, sys
gc.disable()
sys.path += {[str(ROOT), str(Path(msgspec.__file__).parents[1])]!r}
from vmm import launched
launched._spare_typing()
import collections
launched.spare_msgspec()
assert "msgspec" in sys.modules
"""
    done = run(sys.executable, "-I", "-S", "-c", code, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_msgspec_spared_is_msgspec() -> None:
    code = """
import gc, sys
gc.disable()
from vmm import launched
launched.spare_msgspec()
import msgspec, uuid, decimal, datetime
assert msgspec.json.decode(b'{"a": [1, null]}') == {"a": [1, None]}
assert uuid.uuid4() != uuid.uuid4() and decimal.Decimal(1) == 1 and datetime.date(2020, 1, 1).day == 1
from tools.openapi import document
document()
"""
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
