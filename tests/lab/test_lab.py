# SPDX-License-Identifier: Apache-2.0
"""The lab around its machine: ports, statuses, time, signals. The machine itself is tests/linux/test_lab.py's."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmm import lab
from vmm.errors import ConfigError
from vmm.lab import image
from vmm.lab.machine import CPU, PORTS, Boot, Died, missing, qemu_argv
from vmm.lab.qemu import Qemu

IMAGE = image.LabImage("/kernel", "/initramfs", "6.1.0-0-test", "/modules")
QEMU = Qemu(("/qemu",), {}, (10, 0))
Fake = Callable[..., tuple[int, bytes, bytes]]


@pytest.fixture
def boots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake machine, and the file in which each of its boots leaves its process's number."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = shlex.quote(str(Path(__file__).with_name("fake_qemu.py")))
    qemu = programs / "qemu-system-x86_64"
    version = '[ "$1" = --version ] && echo "QEMU emulator version 9.1.0" && exit'
    qemu.write_text(f'#!/bin/sh\n{version}\nexec {shlex.quote(sys.executable)} {fake} "$@"\n')
    qemu.chmod(0o755)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("FAKE_LAB_BOOTS", str(tmp_path / "boots"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(lab, "missing", list)
    monkeypatch.setattr(lab, "lab_image", lambda progress: IMAGE)
    return tmp_path / "boots"


@pytest.fixture
def run(boots: Path, tmp_path: Path) -> Iterator[Fake]:
    """``lab.run``, which gives status, output and errors; afterwards nothing of it may be left."""

    def call(*argv: str, given: bytes | None = None, **options: object) -> tuple[int, bytes, bytes]:
        source = tmp_path / "given"
        source.write_bytes(given or b"")
        with open(source, "rb") as stdin, open(tmp_path / "o", "w+b") as out, open(tmp_path / "e", "w+b") as err:
            status = lab.run(
                argv, stdin=None if given is None else stdin.fileno(), stdout=out.fileno(), stderr=err.fileno(),
                **options,  # type: ignore[arg-type]
            )  # fmt: skip
        return status, (tmp_path / "o").read_bytes(), (tmp_path / "e").read_bytes()

    yield call
    assert os.listdir(tmp_path / "tmp") == []
    for pid in boots.read_text().split() if boots.exists() else ():
        assert not Path("/proc", pid).exists()


def test_status_output_and_errors_come_back(run: Fake) -> None:
    assert run("sh", "-c", "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")


def test_a_signal_is_128_and_its_number(run: Fake) -> None:
    assert run("sh", "-c", "kill -TERM $$")[0] == 128 + signal.SIGTERM


def test_every_byte_goes_in_and_comes_out(run: Fake) -> None:
    data = os.urandom(1 << 20)
    assert run("tee", "/dev/stderr", given=data) == (0, data, data)


def test_no_stdin_is_an_empty_one(run: Fake) -> None:
    assert run("wc", "-c")[1].split() == [b"0"]
    assert run("wc", "-c", given=b"")[1].split() == [b"0"]


def test_the_command_may_leave_its_input(run: Fake) -> None:
    assert run("true", given=os.urandom(4 << 20))[0] == 0


def test_directory_and_environment(run: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "it's a 'place'"
    there.mkdir()
    monkeypatch.chdir(there)
    monkeypatch.setenv("PYVMM_WORD", "a 'b' $c")
    monkeypatch.setenv("SECRET", "not for the lab")
    status, out, _ = run("sh", "-c", 'pwd; echo "$PYVMM_WORD;$PYVMM_LAB;$SECRET"')
    assert (status, out.decode()) == (0, f"{there}\na 'b' $c;1;\n")
    monkeypatch.setattr(lab, "_environment", lambda: {"ONLY": "this"})
    assert run("env")[1] == b"ONLY=this\nPYVMM_LAB=1\n"


def test_it_is_shown_what_it_needs_or_all(run: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LAB_SHOWN", str(tmp_path / "shown"))
    assert run("true")[0] == 0
    root, *names = (tmp_path / "shown").read_text().splitlines()
    assert root != "/" and {"usr", "etc", "tmp", "proc"} <= set(names)
    assert run("true", host_root=True)[0] == 0
    assert (tmp_path / "shown").read_text().splitlines() == ["/", *sorted(os.listdir("/"))]


def test_time_is_over(run: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("sleep", "600", timeout=1.5)[0] == 124
    assert capfd.readouterr().err == "pyvmm lab: the time limit of 1.5 s is over\n"


def test_a_boot_that_fails_is_tried_again(
    run: Fake, boots: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_LAB", "once")
    assert run("echo", "here")[:2] == (0, b"here\n")
    assert "no such machine" in capfd.readouterr().err
    assert boots.read_text().count("\n") == 2


def test_a_machine_that_hangs_is_tried_again(run: Fake, boots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LAB", "mute")
    monkeypatch.setattr("vmm.lab.machine.UP_SECONDS", 1)
    with pytest.raises(lab.LabError, match="not up after 1 s"):
        run("true")
    assert boots.read_text().count("\n") == 2


def test_a_boot_that_fails_twice_shows_the_console(run: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LAB", "stillborn")
    with pytest.raises(lab.LabError, match="no such machine\na line on the console"):
        run("true")


def test_a_machine_of_which_a_cpu_is_lost_is_ended(run: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LAB", "lost")
    monkeypatch.setattr("vmm.lab.machine.STILL_SECONDS", 1)
    with pytest.raises(lab.LabError, match="its CPU 1/TCG has stood still for 1 s"):
        run("sleep", "60")


def test_a_command_is_not_run_twice(run: Fake, boots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LAB", "dies")
    with pytest.raises(lab.LabError, match="ended under the command"):
        run("true")
    assert boots.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"write": ["/there/is/none"]}, "--write /there/is/none: is not a directory"),
        ({"read": ["/there/is/none"]}, "--read /there/is/none: is not there"),
        ({"qemu": "/bin/true"}, "--qemu /bin/true: is not a QEMU that can run here"),
        ({"memory": "1000T"}, "--memory 1000T: this host has .*M free"),
        ({"memory": "much"}, "--memory much: a size is"),
    ],
)
def test_mistakes_are_one_line(run: Fake, options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        run("true", **options)
    assert "\n" not in str(error.value)


def _process(boots: Path, script: str, **options: object) -> subprocess.Popen[bytes]:
    # In a process of its own, for signals to it. Returns once the command has said a line.
    code = f"""
import sys
from vmm import lab
lab.missing, lab.lab_image = list, lambda progress: lab.image.LabImage("/kernel", "/initramfs", "v", "/m")
sys.exit(lab.run(["sh", "-c", {script!r}], stdin=None))
"""
    # A test run in the background of a shell was started deaf to SIGINT, and a shell's trap cannot undo that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout.readline() == b"here\n"
    return process  # type: ignore[no-any-return]


def _gone(boots: Path) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(int(boots.read_text()), 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_the_first_interrupt_is_the_commands(boots: Path) -> None:
    with _process(boots, "trap 'echo got it; exit 9' INT; echo here; while :; do sleep 0.1; done") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate()[0] == b"got it\n"
    assert process.returncode == 9


def test_the_second_interrupt_ends_it(boots: Path) -> None:
    with _process(boots, "trap 'echo no' INT; echo here; while :; do sleep 0.1; done") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"no\n"
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert _gone(boots)


def test_told_to_end_it_leaves_nothing(boots: Path, tmp_path: Path) -> None:
    with _process(boots, "echo here; exec sleep 600") as process:
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert _gone(boots)
    assert os.listdir(tmp_path / "tmp") == []


def test_killed_it_leaves_no_machine(boots: Path) -> None:
    with _process(boots, "echo here; exec sleep 600") as process:
        process.kill()
    assert _gone(boots)


def test_the_readers_end_is_the_commands(boots: Path) -> None:
    with _process(boots, "trap 'exit 5' PIPE; echo here; while :; do echo more; sleep 0.1; done") as process:
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 5


def _argv(**changes: object) -> list[str]:
    ports = {name: fd for fd, name in enumerate(PORTS)}
    options = {
        "cpu": CPU, "cpus": 3, "memory": "1G", "job": "/job", "host": "/view", "writable": ["/a,b"], "ports": ports,
    }  # fmt: skip
    return qemu_argv(QEMU, IMAGE, **(options | changes))  # type: ignore[arg-type]


def test_only_writable_directories_are_writable() -> None:
    exports = {part.split(",")[1]: part for part in _argv() if part.startswith("local,")}
    assert set(exports) == {"id=host", "id=job", "id=w0"}
    assert [name for name, export in exports.items() if "readonly=on" in export] == ["id=host"]
    assert ",path=/a,,b," in exports["id=w0"]


def test_the_machine_has_what_was_asked_for() -> None:
    argv = _argv()
    for option, value in (("-smp", "4"), ("-m", "1G"), ("-kernel", "/kernel"), ("-initrd", "/initramfs")):
        assert argv[argv.index(option) + 1] == value
    assert argv[argv.index("-cpu") + 1] == CPU and {"+svm", "-xsave", "-avx", "-avx2"} <= set(CPU.split(","))
    changed = _argv(cpu="max,+svm,+xsave")
    assert changed[changed.index("-cpu") + 1] == "max,+svm,+xsave"
    for fd, name in enumerate(PORTS):
        assert f"socket,id={name},fd={fd}" in argv and f"virtserialport,chardev={name},name={name}" in argv


def test_init_is_a_shell_script() -> None:
    assert image.INIT.startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n"], input=image.INIT.encode(), check=True)


@pytest.mark.parametrize("name", ["MODULES", "OPTIONAL_MODULES", "INIT"])
def test_the_image_is_made_anew_when_it_would_differ(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = image.image_key("6.1.1")
    assert before == image.image_key("6.1.1") != image.image_key("6.1.2")
    monkeypatch.setattr(image, name, getattr(image, name) * 2)
    assert image.image_key("6.1.1") != before


def test_a_full_disk_has_no_half_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules/6.1.0").mkdir(parents=True)
    (tmp_path / "modules/6.1.0/modules.dep").touch()
    monkeypatch.setattr("vmm.images.apt.package", lambda *_, **__: SimpleNamespace(tree=tmp_path, version="6.1"))
    monkeypatch.setattr("vmm.images.apt.kernel_of", lambda tree: (tree / "vmlinuz", "6.1.0"))
    monkeypatch.setattr("vmm.images.apt.modules_root", lambda tree: tree / "modules")
    monkeypatch.setattr(image, "cache_root", lambda: str(tmp_path))
    monkeypatch.setattr("vmm.images.initramfs.build_initramfs", lambda *_, **__: bytes(1 << 16))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            image.lab_image()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "lab") == []
    assert Path(image.lab_image().initramfs).stat().st_size == 1 << 16


def test_a_host_without_qemu_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert any("apt-get install qemu-system-x86" in line for line in missing())


def test_a_reader_that_ends_after_the_machine_is_no_error_of_its_own() -> None:
    out, sink = os.pipe()
    os.close(out)

    def command(ports: dict[str, int]) -> list[str]:
        return [sys.executable, "-c", f"import os; os.write({ports['out']}, b'said')"]

    with Boot(command, {}, None, sink, 2, framed=True) as boot:
        boot._process.wait()
        with pytest.raises(Died, match="it ended under the command"):
            boot.run(time.monotonic() + 10)
    os.close(sink)
