# SPDX-License-Identifier: Apache-2.0
"""``pyvmm serve``'s log, metrics, serial output, boot timer and keyboard, by its own process and a tiny guest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.oracle import PYVMM
from tests.boot.kernel_images import note, pvh_elf, pvh_note
from tests.kvm.guests import write_guest
from tests.unix_http import Connection
from tests.waiting import PATIENCE, until
from vmm.errors import ConfigError
from vmm.kvm.vm import Kvm, software_kvm

IDLE = "1: hlt; jmp 1b"
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}"


@pytest.fixture(autouse=True)
def _kvm() -> None:
    try:
        Kvm().close()
    except ConfigError as error:
        pytest.skip(f"LAYER MISSING: kvm: {error}")


class Served:
    """A ``pyvmm serve`` and its API."""

    def __init__(self, directory: Path, *options: str, stdout: int = subprocess.DEVNULL) -> None:
        self.directory = directory
        self._socket = directory / "api.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmm", "serve", "--api-sock", str(self._socket), "--id", "vm1", *options],
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: self._connects() or self.process.poll() is not None)

    def _connects(self) -> bool:
        with contextlib.closing(Connection(self._socket)) as connection, contextlib.suppress(OSError):
            connection.connect()
            return True
        return False

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, str, str | None]:
        with contextlib.closing(Connection(self._socket)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.getheader("Content-Type")

    def put(self, path: str, **body: object) -> None:
        status, text, _ = self.ask("PUT", path, body)
        assert status == 204, text

    def act(self, action: str) -> tuple[int, str]:
        return self.ask("PUT", "/actions", {"action_type": action})[:2]

    def boot(self, source: str) -> None:
        self.boot_file(write_guest(self.directory, source))

    def boot_file(self, kernel: str) -> None:
        self.put("/boot-source", kernel_image_path=kernel)
        self.put("/machine-config", vcpu_count=1, mem_size_mib=16)
        self.put("/actions", action_type="InstanceStart")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    running: list[Served] = []

    def start(*options: str, **more: Any) -> Served:
        running.append(Served(tmp_path, *options, **more))
        return running[-1]

    yield start
    for each in running:
        each.close()


def touched(path: Path) -> Path:
    path.touch()
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_come_at_the_start_by_the_action_and_at_the_end(serve: Serve, tmp_path: Path) -> None:
    path = touched(tmp_path / "metrics")
    start = ("--start-time-us", "0", "--start-time-cpu-us", "0")
    vm = serve("--metrics-path", str(path), *start, stdout=subprocess.PIPE)
    vm.boot("mov al, 'x'; mov dx, 0x3f8; out dx, al;" + IDLE)
    assert vm.process.stdout is not None
    with vm.process.stdout as output:
        assert output.read(1) == b"x"
    assert vm.act("FlushMetrics") == (204, "")
    assert len(lines(path)) == 2
    assert vm.end() == 0
    first, _, last = lines(path)
    assert first["api_server"]["process_startup_time_us"] > 0
    assert first["put_api_requests"]["boot_source_count"] == 1
    assert sum(line["uart"]["write_count"] for line in lines(path)) == 1
    assert last["put_api_requests"]["boot_source_count"] == 0


def test_flush_without_a_path_is_no_error(serve: Serve) -> None:
    vm = serve()
    vm.boot(IDLE)
    assert vm.act("FlushMetrics") == (204, "")


def test_full_metrics_fifo_is_an_error_of_the_action_and_of_nothing_else(serve: Serve, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    vm = serve()
    vm.put("/metrics", metrics_path=str(tmp_path / "fifo"))
    vm.boot(IDLE)
    answers = [vm.act("FlushMetrics") for _ in range(40)]
    assert answers[0] == (204, "")
    assert answers[-1][0] == 400
    assert "Resource temporarily unavailable" in answers[-1][1]
    assert json.loads(vm.ask("GET", "/")[1])["state"] == "Running"
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    while os.read(reader, 1 << 20):
        if vm.act("FlushMetrics") == (204, ""):
            break
    os.close(reader)
    assert vm.end() == 0


def test_log_goes_to_a_fifo_that_nobody_reads(serve: Serve, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    metrics = touched(tmp_path / "metrics")
    vm = serve("--log-path", str(tmp_path / "fifo"), "--level=debug", "--show-level", f"--metrics-path={metrics}")
    for _ in range(1000):
        assert vm.ask("GET", "/")[0] == 200
    vm.boot(IDLE)
    vm.act("FlushMetrics")
    assert lines(metrics)[-1]["logger"]["missed_log_count"] + lines(metrics)[0]["logger"]["missed_log_count"] > 100
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    text = os.read(reader, 1 << 20).decode()
    os.close(reader)
    assert re.match(rf"{STAMP} \[vm1:[^:\]]+:INFO\] ", text)
    assert all(re.match(rf"{STAMP} \[vm1:", line) for line in text.splitlines())


def test_stdout_that_nobody_reads_holds_up_neither_api_nor_guest(serve: Serve) -> None:
    reader, writer = os.pipe()
    vm = serve(stdout=writer)
    os.close(writer)
    # The port shows itself ready only if somebody takes what was sent, beyond the 128 KiB that pipe and port hold.
    vm.boot(
        "mov ebx, 800; 1: mov dx, 0x3fd; 2: in al, dx; test al, 0x20; jz 2b; mov dx, 0x3f8; mov ecx, 256;"
        "lea esi, [text]; cld; rep outsb; dec ebx; jnz 1b; mov al, 0xfe; out 0x64, al; 3: hlt; jmp 3b;"
        "text: .fill 256, 1, 'y'"
    )
    assert vm.process.wait(PATIENCE) == 0
    data = os.read(reader, 1 << 20)
    assert data.count(b"y") >= 50000
    os.close(reader)


def test_serial_output_goes_to_a_fifo(serve: Serve, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "serial")
    vm = serve()
    vm.put("/serial", serial_out_path=str(tmp_path / "serial"))
    vm.boot("mov al, 'x'; mov dx, 0x3f8; out dx, al;" + IDLE)
    with open(tmp_path / "serial", "rb", buffering=0) as reader:
        assert reader.read(1) == b"x"


def test_serial_output_of_a_loaded_snapshot_goes_where_its_process_says(serve: Serve, tmp_path: Path) -> None:
    """Not into the file of the machine that was saved, as in Firecracker."""
    before, after = touched(tmp_path / "before"), touched(tmp_path / "after")
    vm = serve()
    vm.put("/serial", serial_out_path=str(before))
    vm.boot("again: mov al, 'x'; mov dx, 0x3f8; out dx, al; mov ecx, 100000; w: loop w; jmp again;")
    until(lambda: before.stat().st_size)
    assert vm.ask("PATCH", "/vm", {"state": "Paused"})[0] == 204
    names = {"snapshot_path": str(tmp_path / "snap"), "mem_file_path": str(tmp_path / "mem")}
    vm.put("/snapshot/create", **names)
    vm.end()
    said = before.read_bytes()
    for path in (after, None):
        other = serve()
        if path is not None:
            other.put("/serial", serial_out_path=str(path))
        other.put("/snapshot/load", **names, resume_vm=True)
        shown = json.loads(other.ask("GET", "/vm/config")[1])
        assert shown.get("serial", {}).get("serial_out_path") == (path and str(path))
        if path is not None:
            until(lambda: after.stat().st_size)
        other.end()
    assert before.read_bytes() == said


def test_serial_output_is_limited(serve: Serve, tmp_path: Path) -> None:
    output = touched(tmp_path / "serial")
    vm = serve()
    limit = {"bandwidth": {"size": 1000, "refill_time": 3_600_000}}
    vm.put("/serial", serial_out_path=str(output), rate_limiter=limit)
    vm.boot("mov ecx, 5000; mov al, 'x'; mov dx, 0x3f8; again: out dx, al; loop again;" + IDLE)

    def lost() -> int:
        counted = re.search(r"uart_missed_write_total (\d+)", vm.ask("GET", "/metrics/prometheus")[1])
        return int(counted[1]) if counted else 0

    until(lambda: output.stat().st_size + lost() == 5000)
    assert 500 <= output.stat().st_size <= 1000


def test_guest_tells_the_boot_timer(serve: Serve, tmp_path: Path) -> None:
    log = touched(tmp_path / "log")
    vm = serve("--boot-timer", "--log-path", str(log), "--show-level")
    vm.boot("mov edi, 0xd0000000; mov al, 123; mov [edi], al;" + IDLE)
    until(lambda: "Guest-boot-time" in log.read_text())
    form = rf"^{STAMP} \[vm1:fc_vcpu 0:INFO\] Guest-boot-time = +\d+ us \d+ ms, +\d+ CPU us \d+ CPU ms$"
    assert re.search(form, log.read_text(), re.MULTILINE)


def test_ctrl_alt_del_is_refused_once_the_guest_does_not_read_it(serve: Serve) -> None:
    """As Firecracker 1.12.1: four presses fit."""
    vm = serve()
    vm.boot(IDLE)
    assert [vm.act("SendCtrlAltDel")[0] for _ in range(6)] == [204] * 4 + [400] * 2


def test_prometheus_reads_the_counters(serve: Serve) -> None:
    vm = serve()
    vm.boot("mov al, 'x'; mov dx, 0x3f8; out dx, al;" + IDLE)
    until(lambda: "pyvmm_uart_write_total 1\n" in vm.ask("GET", "/metrics/prometheus")[1])
    status, text, kind = vm.ask("GET", "/metrics/prometheus")
    assert (status, kind) == (200, "text/plain; version=0.0.4")
    assert 'pyvmm_info{id="vm1",state="Running",version="' in text
    assert 'pyvmm_vcpu_exits_total{vcpu="0",kind="io_out"} 1\n' in text
    assert "pyvmm_put_api_requests_boot_source_total 1\n" in text


def test_log_options_may_come_by_the_api_again_and_again(serve: Serve, tmp_path: Path) -> None:
    first, second = touched(tmp_path / "first"), touched(tmp_path / "second")
    vm = serve()
    vm.put("/logger", log_path=str(first), level="Info")
    vm.put("/logger", log_path=str(second))
    vm.put("/logger", level="OFF")
    status, text, _ = vm.ask("PUT", "/logger", {"log_path": str(tmp_path / "none"), "level": "Info"})
    assert status == 400 and "log_path" in text
    vm.ask("GET", "/")
    assert "/logger" in first.read_text() and "/logger" in second.read_text()
    assert "GET" not in second.read_text().upper().replace("TARGET", "")


@pytest.mark.parametrize("notes", [b"", note(b"pyvmm", 1, bytes(4))])
def test_log_says_that_a_software_kvm_brings_linux_nowhere(serve: Serve, tmp_path: Path, notes: bytes) -> None:
    log, kernel = touched(tmp_path / "log"), tmp_path / "vmlinux"
    linux = pvh_note() + note(b"Linux", 0x101, b"6.1\0")
    kernel.write_bytes(pvh_elf(bytes.fromhex("f4ebfd"), notes=linux + notes))  # 1: hlt; jmp 1b
    vm = serve("--log-path", str(log), "--show-level")
    vm.boot_file(str(kernel))
    said = ":WARN] /dev/kvm is a software KVM" in log.read_text()
    assert said is (software_kvm() is not None and not notes)


def test_log_of_requests_is_firecrackers(serve: Serve, tmp_path: Path) -> None:
    log = touched(tmp_path / "log")
    vm = serve("--log-path", str(log), "--level", "Debug", "--show-level")
    vm.put("/drives/a", drive_id="a", path_on_host=str(touched(tmp_path / "disk")), is_root_device=False)
    assert vm.ask("PUT", "/drives/a", {"drive_id": "b"})[0] == 400
    vm.ask("GET", "/version")
    # As Firecracker 1.12.1 wrote it, but for the texts of errors.
    forms = [
        r"INFO\] API server started\.",
        r'INFO\] The API server received a Put request on "/drives/a" with body "\{\\"drive_id\\": \\"a\\", .*\}"\.',
        r"INFO\] The request was executed successfully\. Status code: 204 No Content\.",
        r"DEBUG\] Total previous API call duration: \d+ us\.",
        r'INFO\] The API server received a Put request on "/drives/a" with body .*',
        r"ERROR\] Received Error\. Status code: 400 Bad Request\. Message: [^{].*",
        r"DEBUG\] Total previous API call duration: \d+ us\.",
        r'INFO\] The API server received a Get request on "/version"\.',
        r"INFO\] The request was executed successfully\. Status code: 200 OK\.",
        r"DEBUG\] Total previous API call duration: \d+ us\.",
    ]
    written = [line for line in log.read_text().splitlines() if ":fc_api:" in line]
    assert len(written) == len(forms), written
    for line, form in zip(written, forms, strict=True):
        assert re.fullmatch(rf"{STAMP} \[vm1:fc_api:{form}", line), line


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--level", "bogus"], 152, "--level bogus: must be Off, Error, Warn"),
        (["--level="], 152, "--level: must be Off, Error, Warn"),
        (["--log-path", "/nonexistent/x"], 1, "log_path /nonexistent/x: must be an existing, writable file or FIFO"),
        (
            ["--metrics-path", "/nonexistent/x"],
            1,
            "metrics_path /nonexistent/x: must be an existing, writable file or FIFO",
        ),
    ],
)
def test_options_that_cannot_be_end_it_with_firecrackers_status(
    serve: Serve, options: list[str], status: int, words: str
) -> None:
    vm = serve(*options)
    assert vm.process.wait(PATIENCE) == status
    assert vm.process.stderr is not None
    assert words in vm.process.stderr.read().decode()


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--config-file", "missing"], 1, "--config-file missing: No such file or directory"),
        (["--api-sock", "/nowhere/s"], 1, "--api-sock /nowhere/s: cannot be made: No such file or directory"),
        (["--id", "a_b"], 153, "--id a_b: must be 1 to 64 letters, digits and hyphens"),
        (["--level", "loud"], 152, "--level loud: must be Off, Error, Warn"),
        (["--metadata", "missing"], 1, "--metadata missing: No such file or directory"),
        (["--metrics-path", "missing"], 1, "must be an existing, writable file or FIFO"),
    ],
)
def test_a_failed_start_leaves_its_reason_in_the_log(
    tmp_path: Path, options: list[str], status: int, reason: str
) -> None:
    log = touched(tmp_path / "log")
    command = [*PYVMM, "--api-sock", "s", "--log-path", "log", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = log.read_text().splitlines()
    assert done.returncode == status
    assert reason in done.stderr and done.stderr.count("\n") == 1
    assert reason in lines[-2]
    assert lines[-1].endswith(f"] Firecracker exiting with error. exit_code={status}")


@pytest.mark.parametrize(("value", "status"), [(0, 0), (7, 7), (127, 127), (128, 127), (148, 127), (255, 127)])
def test_an_exit_port_that_was_asked_for_decides_up_to_127(tmp_path: Path, value: int, status: int) -> None:
    assert _served_with_exit_port(tmp_path, value, {"exit_port": 244}) == status


def test_without_being_asked_for_the_exit_port_is_not_there(tmp_path: Path) -> None:
    assert _served_with_exit_port(tmp_path, 148, {}) == 0


def _served_with_exit_port(directory: Path, value: int, host: dict[str, int]) -> int:
    # Where the port is not there the guest goes on, and resets itself.
    guest = write_guest(directory, f"mov al, {value}; out 0xf4, al; mov al, 0xfe; out 0x64, al; 1: hlt; jmp 1b")
    config = {
        "boot-source": {"kernel_image_path": guest},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "drives": [],
        "pyvmm": host,
    }
    (directory / "config.json").write_text(json.dumps(config))
    command = [*PYVMM, "--no-api", "--config-file", "config.json"]
    return subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, timeout=PATIENCE).returncode
