# SPDX-License-Identifier: Apache-2.0
"""The log: its form, its levels, and readers that are slow, absent or gone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.logs import forget_log
from virtio.device import Warner
from vmm import logger
from vmm.errors import ConfigError

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}"
# From the checkout; from the root where the package is a copy elsewhere.
HERE = __file__ if "PYVMM_SANITIZER" in os.environ else "tests/vmm/test_logger.py"


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    forget_log()
    yield
    forget_log()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def drain(fd: int) -> bytes:
    data = b""
    while True:
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            return data
        if not part:
            return data
        data += part


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, r"\[vm1:main\]"),
        ({"show_level": True}, r"\[vm1:main:WARN\]"),
        ({"show_log_origin": True}, rf"\[vm1:main:{re.escape(HERE)}:\d+\]"),
        ({"show_level": True, "show_log_origin": True}, rf"\[vm1:main:WARN:{re.escape(HERE)}:\d+\]"),
    ],
)
def test_line_has_firecrackers_form(log: Path, options: dict[str, Any], form: str) -> None:
    logger.configure(log_path=str(log), vmm_id="vm1", **options)
    logger.warn("text: with [brackets]")
    assert re.fullmatch(rf"{STAMP} {form} text: with \[brackets\]\n", log.read_text())


def test_thread_is_named(log: Path) -> None:
    logger.configure(log_path=str(log))
    thread = threading.Thread(target=logger.info, args=("hello",), name="fc_vcpu 3")
    thread.start()
    thread.join()
    assert log.read_text().endswith(" [anonymous-instance:fc_vcpu 3] hello\n")


@pytest.mark.parametrize("name", ["off", "Error", "eRrOr", "Warn", "WARNING", "Info", "debug", "TRACE"])
def test_levels_of_any_case_let_the_more_important_through(log: Path, name: str) -> None:
    logger.configure(log_path=str(log), level=name, show_level=True)
    for level in range(logger.ERROR, logger.TRACE + 1):
        logger.log(level, "x")
    seen = [line.split(":")[-1].split("]")[0] for line in log.read_text().splitlines()]
    assert seen == list(logger.LABELS[1 : logger.parse_level(name) + 1])


@pytest.mark.parametrize("name", ["", "Critical", "warn ", "3"])
def test_unknown_level_changes_nothing(log: Path, tmp_path: Path, name: str) -> None:
    logger.configure(log_path=str(log))
    (tmp_path / "other").touch()
    with pytest.raises(ConfigError, match="must be Off, Error, Warn"):
        logger.configure(log_path=str(tmp_path / "other"), level=name)
    logger.info("here")
    assert log.read_text().endswith("here\n")


@pytest.mark.parametrize("make", ["absent", "directory", "nul"])
def test_path_that_cannot_be_written_is_refused(tmp_path: Path, make: str) -> None:
    path = {"absent": str(tmp_path / "no"), "directory": str(tmp_path), "nul": "a\0b"}[make]
    with pytest.raises(ConfigError, match=r"log_path .*must be an existing, writable file or FIFO"):
        logger.configure(log_path=path)


def test_what_is_not_given_stays(log: Path) -> None:
    logger.configure(log_path=str(log), level="Debug", show_level=True, vmm_id="a")
    logger.configure(show_log_origin=False)
    logger.debug("x")
    assert log.read_text().endswith("[a:main:DEBUG] x\n")


def test_file_is_appended_to(log: Path) -> None:
    log.write_text("before\n")
    logger.configure(log_path=str(log))
    logger.info("after")
    assert log.read_text().startswith("before\n2")


def test_another_file_takes_over(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    logger.configure(log_path=str(log))
    logger.info("one")
    open_before = len(os.listdir("/proc/self/fd"))
    logger.configure(log_path=str(other))
    logger.info("two")
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert "two" not in log.read_text()
    assert other.read_text().endswith("two\n")


@pytest.mark.parametrize(("module", "lines"), [("tests.vmm", 1), ("tests::vmm", 1), ("virtio", 1), ("vmm", 0)])
def test_module_filters_by_where_the_line_comes_from(log: Path, module: str, lines: int) -> None:
    logger.configure(log_path=str(log), module=module)
    if module == "virtio":
        exec("logger.info('x')", {"logger": logger, "__name__": "virtio.blk.device"})
    else:
        logger.info("x")
    assert len(log.read_text().splitlines()) == lines


def test_text_of_several_lines_is_one(log: Path) -> None:
    logger.configure(log_path=str(log))
    logger.info("a\nb\rc\x1b[2J é")
    assert log.read_text().endswith("] a\\nb\\rc\\x1b[2J é\n")
    assert len(log.read_text().splitlines()) == 1


def test_warnings_of_devices_arrive_with_their_origin(log: Path) -> None:
    logger.configure(log_path=str(log), show_level=True, show_log_origin=True)
    warn = Warner()
    for _ in range(5):
        warn("kind", "ring broken")
    lines = log.read_text().splitlines()
    assert [line.split("] ")[1] for line in lines] == [
        "ring broken", "ring broken (seen 2 times)", "ring broken (seen 4 times)"
    ]  # fmt: skip
    assert all(f":WARN:{HERE}:" in line for line in lines)


def test_unconfigured_warnings_go_to_stderr_and_the_rest_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    logger.error("bad")
    logger.warn("so so")
    logger.info("fine")
    assert capsys.readouterr() == ("", "pyvmm: bad\npyvmm: so so\n")


def test_configured_without_a_path_goes_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    logger.configure(vmm_id="x")
    logger.info("fine")
    logger.debug("detail")
    out, err = capfd.readouterr()
    assert re.fullmatch(rf"{STAMP} \[x:main\] fine\n", out)
    assert err == ""


def test_fifo_without_a_reader_keeps_lines_for_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    logger.configure(log_path=str(tmp_path / "fifo"))
    logger.info("early")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert drain(reader).endswith(b"early\n")
    os.close(reader)
    logger.info("the reader is gone, and that harms nobody")
    assert logger.missed() == 0


@pytest.mark.parametrize("size", [60, 900, 4090, 9000, 70000])
def test_full_fifo_loses_whole_lines_and_counts_them(tmp_path: Path, size: int) -> None:
    os.mkfifo(tmp_path / "fifo")
    logger.configure(log_path=str(tmp_path / "fifo"))
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    sent, data = 2000 if size < 1000 else 40, b""
    for number in range(sent):
        logger.info(f"{number} {'x' * size} end")
    lost = logger.missed()
    assert 0 < lost < sent
    data = drain(reader)
    for _ in range(3):  # what was cut in the middle goes on
        logger.info("flushed")
        data += drain(reader)
    lines = data.decode().splitlines()
    assert all(line.endswith(" end") for line in lines if "flushed" not in line)
    assert sum("flushed" not in line for line in lines) == sent - lost
    os.close(reader)


def test_full_stdout_holds_up_nobody() -> None:
    code = (
        "from vmm import logger; logger.configure()\n"
        "for n in range(2000): logger.info('x' * 9000)\n"
        "import os; os.write(2, str(logger.missed()).encode())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        assert 1900 < int(child.stderr.read()) < 2000  # stdout is not read before
        assert child.wait(30) == 0


def test_lines_of_many_threads_stay_whole(log: Path) -> None:
    logger.configure(log_path=str(log))

    def say() -> None:
        for _ in range(50):
            logger.info("y" * 5000)

    threads = [threading.Thread(target=say, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = log.read_text().splitlines()
    assert len(lines) == 400
    assert all(line.endswith("] " + "y" * 5000) for line in lines)


def test_full_disk_counts() -> None:
    logger.configure(log_path="/dev/full")
    logger.error("x")
    assert logger.missed() == 1


def test_closed_stderr_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    logger.error("nobody hears it")


def test_import_is_cheap() -> None:
    code = "import sys, os, threading, time; had = set(sys.modules); import vmm.logger; print(*set(sys.modules) - had)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) <= {"vmm", "vmm.logger", "vmm.errors", "errno", "__future__"}
