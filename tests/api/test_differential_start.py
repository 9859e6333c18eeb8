# SPDX-License-Identifier: Apache-2.0
"""How Firecracker and pyvmm are started and how they end: the same configuration file, the same words, the same codes.

All that may differ is in docs/api-differences.md.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api.differential import Pair, difference, files, pair, send, table
from tests.api.oracle import PATIENCE, Client, Process
from tests.api.requests import CONFIG, KERNEL, START

__all__ = ["pair"]

# mov al, 0xfe; out 0x64, al; hlt: a reset by the keyboard controller.
RESET = bytes((0xB0, 0xFE, 0xE6, 0x64, 0xF4))
# mov esi, [ebx + 24], the command line of PVH's start info, to the serial port; then the same.
TELL_CMDLINE = bytes.fromhex("8b7318baf8030000ac84c07403eeebf8") + RESET
ADDED = b" root=/dev/vda rw virtio_mmio.device=4K@0xd0000000:5"
DRIVE = {"drive_id": "a", "path_on_host": "a.img", "is_root_device": False, "is_read_only": False}
OTHER = {**DRIVE, "drive_id": "b", "path_on_host": "b.img"}
NET = {"iface_id": "a", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:0A"}
LIMITS = {"bandwidth": {"size": 1000, "refill_time": 100}, "ops": {"size": 10, "one_time_burst": 5, "refill_time": 50}}
BASE: dict[str, Any] = {
    "boot-source": {"kernel_image_path": "kernel"},
    "drives": [],
    "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
}
EVERYTHING: dict[str, Any] = {
    "boot-source": {"kernel_image_path": "kernel", "boot_args": "console=ttyS0 quiet", "initrd_path": "initrd"},
    "drives": [
        {**DRIVE, "cache_type": "Writeback", "rate_limiter": LIMITS},
        {**DRIVE, "drive_id": "r", "path_on_host": "b.img", "is_root_device": True, "partuuid": "0eaa91a0-01"},
        {**DRIVE, "drive_id": "odd", "path_on_host": "odd.img", "is_read_only": True, "io_engine": "Async"},
    ],
    "machine-config": {"vcpu_count": 2, "mem_size_mib": 256, "smt": True, "track_dirty_pages": True},
    "network-interfaces": [
        {**NET, "rx_rate_limiter": LIMITS, "tx_rate_limiter": {}},
        {"iface_id": "b", "host_dev_name": "tap1"},
    ],
    "vsock": {"guest_cid": 3, "uds_path": "v.sock", "vsock_id": "old"},
    "balloon": {"amount_mib": 16, "deflate_on_oom": True, "stats_polling_interval_s": 1},
    "entropy": {"rate_limiter": LIMITS},
    "mmds-config": {"network_interfaces": ["a"], "version": "V2", "ipv4_address": "169.254.170.2"},
    "logger": {"log_path": "log", "level": "Debug", "show_level": True, "show_log_origin": True},
    "metrics": {"metrics_path": "metrics"},
}
# Without its filters Firecracker survives a client that asks while it reads the file, and goes.
WITH_FILE = ("--config-file", "config.json", "--no-seccomp")


def _lists(*of_values: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], ...]:
    return of_values


# What is put over BASE; a value of ... takes a key away. Bytes are a whole file.
CONFIGS: list[Any] = [
    {}, EVERYTHING, b"", b"junk", b"[]", b"{}",
    *({key: ...} for key in BASE),
    {"unknown": 1}, {"boot_source": 1}, {"machine-config": None}, {"drives": None}, {"network-interfaces": None},
    *({"boot-source": source} for source in (
        {}, {"kernel_image_path": "kernel", "unknown": 1}, {"kernel_image_path": "missing"},
        {"kernel_image_path": "junk"}, {"kernel_image_path": "empty"},
        {"kernel_image_path": "kernel", "initrd_path": "missing"},
    )),
    *({"machine-config": machine} for machine in (
        {}, {"vcpu_count": 1}, {"mem_size_mib": 64}, {"vcpu_count": 0, "mem_size_mib": 64},
        {"vcpu_count": 1, "mem_size_mib": 64, "unknown": 1}, {"vcpu_count": None, "mem_size_mib": None},
        {"vcpu_count": 3, "mem_size_mib": 64, "smt": True},
    )),
    *({"drives": drives} for drives in _lists(
        [{}], [DRIVE], [DRIVE, {**DRIVE, "path_on_host": "b.img"}], [{**DRIVE, "path_on_host": "missing"}],
        [{**DRIVE, "drive_id": "a-b"}], [{**DRIVE, "unknown": 1}],
        [{**DRIVE, "is_root_device": True}, {**OTHER, "is_root_device": True}],
    )),
    *({"network-interfaces": nets} for nets in _lists(
        [{}], [NET], [NET, NET], [NET, {**NET, "iface_id": "b"}],
        [NET, {**NET, "iface_id": "b", "host_dev_name": "tap1"}], [{**NET, "host_dev_name": "lo"}],
    )),
    {"cpu-config": None}, {"cpu-config": "missing"}, {"cpu-config": "junk"}, {"cpu-config": {}},
    {"balloon": None}, {"balloon": {"amount_mib": 0, "deflate_on_oom": False}},
    {"balloon": {"amount_mib": 300, "deflate_on_oom": False}},
    {"entropy": {}}, {"entropy": None}, {"entropy": {"unknown": 1}},
    {"vsock": {"guest_cid": 3, "uds_path": "v.sock"}}, {"vsock": {"guest_cid": 2, "uds_path": "v.sock"}},
    {"vsock": {"guest_cid": 3, "uds_path": "no/v.sock"}},
    {"logger": {}}, {"logger": {"log_path": "missing"}}, {"logger": {"level": "loud"}}, {"logger": {"unknown": 1}},
    {"metrics": {}}, {"metrics": {"metrics_path": "missing"}},
    {"mmds-config": {"network_interfaces": ["a"]}},
    {"network-interfaces": [NET], "mmds-config": {"network_interfaces": ["a"], "version": "V2"}},
]  # fmt: skip
# Words after --api-sock api.sock.
COMMAND_LINES = [shlex.split(line) for line in (
    "", "--version", "--help", "-h", "-V", "--unknown", "word", "--api-sock", "--id",
    "--id a-b", "--id a_b", "--id ''", "--id " + "a" * 64, "--id " + "a" * 65, "--id a --id b", "--id=a", "--no-api",
    "--config-file missing", "--no-seccomp", "--no-seccomp --no-seccomp", "--no-seccomp=1", "--seccomp-level 0",
    "--level Info", "--level debug", "--level loud", "--level", "--log-path log", "--log-path missing",
    "--log-path ''", "--metrics-path ''",
    "--log-path log --show-level --show-log-origin --module api", "--metrics-path metrics", "--metrics-path missing",
    "--boot-timer", "--boot-timer 1", "--http-api-max-payload-size 100", "--http-api-max-payload-size x",
    "--http-api-max-payload-size -1", "--mmds-size-limit 100", "--mmds-size-limit x",
    "--start-time-us 1 --start-time-cpu-us 1 --parent-cpu-time-us 1", "--start-time-us x", "--metadata missing",
    "--metadata junk", "--enable-pci", "--version --unknown", "--jailer", "--api other.sock",
    "--seccomp-filter missing", "--seccomp-filter f --no-seccomp",
)]  # fmt: skip


def outcome(process: Process, state: str) -> str:
    """``runs`` as soon as it says that it is in `state`, or how it ended."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.process.poll() is not None:
            code = process.process.returncode
            return "dies" if code < 0 else f"ends with {code}"
        with contextlib.suppress(OSError, AssertionError):
            client = Client(process.socket)
            answer = client.request("GET", "/")
            client.close()
            if answer.json["state"] == state:
                return "runs"
        time.sleep(0.005)
    return "hangs"


def _text(config: Any) -> str:
    return config.decode() if isinstance(config, bytes) else json.dumps(config, default=lambda value: "...")


def _allowed(name: str, key: str, theirs: str, ours: str) -> bool:
    return [key, theirs, ours] in [cells[:3] for cells in table(name)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: _text(config)[:80])
def test_same_configuration_file(pair: Callable[..., Pair], config: Any) -> None:
    def write(directory: Path) -> None:
        if isinstance(config, bytes):
            (directory / "config.json").write_bytes(config)
        else:
            whole = {key: value for key, value in {**BASE, **config}.items() if value is not ...}
            (directory / "config.json").write_text(json.dumps(whole))

    theirs, ours = both = pair(WITH_FILE, prepare=write, wait=False)
    # Firecracker panics where it is asked while it gives up, so it is asked only where pyvmm runs, or it seems to run.
    found = ["", outcome(ours, "Running")]
    if found[1] != "runs":
        with contextlib.suppress(subprocess.TimeoutExpired):
            theirs.wait(2)
    found[0] = outcome(theirs, "Running")
    if found[0] != found[1]:
        assert _allowed("configurations", _text(config), *found), [*found, *(each.output.read_text() for each in both)]
    elif found[0] == "runs":
        assert difference(CONFIG, send(theirs, CONFIG), send(ours, CONFIG)) is None
        assert files(theirs) == files(ours)


@pytest.mark.parametrize(
    "boot_args",
    [
        "a",
        "",
        'a="x  y"   b -- "c  d"',
        "a -- b -- c",
        "a  --  b",
        "a\nb\tc",
        "na\xefve",
        "\x01\x7f",
        "-- b",
        'a "--" b',
    ],
)
def test_same_kernel_command_line(pair: Callable[..., Pair], boot_args: str) -> None:
    config = {**BASE, "boot-source": {"kernel_image_path": "kernel", "boot_args": boot_args}}
    config["drives"] = [{**DRIVE, "is_root_device": True}]

    def write(directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps(config))

    both = pair(("--config-file", "config.json", "--log-path", "log"), prepare=write, wait=False, code=TELL_CMDLINE)
    told = []
    for process in both:
        assert process.wait(PATIENCE) == 0
        told.append([line for line in process.output.read_bytes().split(b"\n") if b"anonymous-instance" not in line])
    theirs, ours = (b"\n".join(each) for each in told)
    if boot_args == "-- b":  # taken by Firecracker for the kernel's own
        assert (theirs, ours) == (b"-- b" + ADDED, ADDED[1:] + b" -- b")
    elif "--" in boot_args and '"--"' in boot_args:  # by Linux's rules the quotes do not count
        assert (theirs, ours) == (b'a "--" b' + ADDED, b"a" + ADDED + b" -- b")
    else:
        assert theirs == ours


@pytest.mark.parametrize("words", COMMAND_LINES, ids=shlex.join)
def test_same_command_line(pair: Callable[..., Pair], words: list[str]) -> None:
    both = pair(words, wait=False)
    found = [outcome(process, "Not started") for process in both]
    if found[0] != found[1]:
        printed = [each.output.read_text() for each in both]
        assert _allowed("command lines", shlex.join(words), *found), [*found, *printed]


def test_what_each_tells_is_a_configuration_for_the_other(pair: Callable[..., Pair], tmp_path: Path) -> None:
    def write(text: bytes) -> Callable[[Path], object]:
        return lambda directory: (directory / "config.json").write_bytes(text)

    text = json.dumps(EVERYTHING).encode()
    told = []
    for _ in range(2):
        both = pair(WITH_FILE, prepare=write(text), wait=False)
        assert [outcome(process, "Running") for process in both] == ["runs", "runs"]
        theirs, ours = (send(process, CONFIG) for process in both)
        assert theirs is not None and ours is not None
        told.append((theirs.body, ours.body))
        text = ours.body if len(told) == 1 else theirs.body
    (_, ours_first), (_, ours_again) = told
    assert ours_again == ours_first, "what pyvmm tells of a configuration is that configuration"


def test_a_guest_that_resets_ends_both(pair: Callable[..., Pair]) -> None:
    both = pair(code=RESET)
    for process in both:
        assert send(process, KERNEL).status == 204  # type: ignore[union-attr]
        assert send(process, START).status == 204  # type: ignore[union-attr]
    assert [process.wait() for process in both] == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_both(pair: Callable[..., Pair], number: int) -> None:
    both = pair()
    for process in both:
        for request in (KERNEL, START):
            assert send(process, request).status == 204  # type: ignore[union-attr]
        process.process.send_signal(number)
    codes = [process.wait() for process in both]
    assert codes[0] in (-number, 156) and codes[1] == 0, "and pyvmm takes its time to do it in good order: 0"


# Lines of Firecracker's log that no user or program of its own waits for.
_THEIRS_ALONE = ("Artificially kick devices.", "immediate_exit", "KVM_EXIT_SHUTDOWN")


@pytest.mark.parametrize(
    ("options", "source"),
    [
        (["--config-file", "config.json"], "kernel"),
        (["--config-file", "config.json"], "junk"),
        (["--config-file", "config.json"], "missing"),
        (["--config-file", "config.json", "--no-api"], "kernel"),
        (["--metrics-path", "missing"], "kernel"),
    ],
    ids=" ".join,
)
def test_same_words_in_the_log(pair: Callable[..., Pair], options: list[str], source: str) -> None:
    def write(directory: Path) -> None:
        config = {**BASE, "boot-source": {"kernel_image_path": source}}
        (directory / "config.json").write_text(json.dumps(config))

    both = pair(["--log-path", "log", *options], prepare=write, wait=False, code=RESET)
    told, reasons = [], []
    for process in both:
        process.wait(PATIENCE)
        lines = [line.partition("] ")[2] for line in (process.directory / "log").read_text().splitlines()]
        assert "Traceback" not in process.output.read_text()
        # The order of the API's thread is its own; the VM's end is told once and with its reason here.
        lines = [line for line in lines if not any(part in line for part in _THEIRS_ALONE)]
        reasons.append([line for line in lines if "error: " in line or (": " in line and "exit_code" not in line)])
        told.append(list(dict.fromkeys(line for line in lines if line not in reasons[-1] + ["API server started."])))
    if source != "kernel" or "missing" in options:
        assert reasons[0] and reasons[1], "each says why"
    told[0] = [line for line in told[0] if line != "Vmm is stopping." or told[0][-1].endswith("exit_code=0")]
    assert told[0] == told[1]


def test_a_live_socket_is_refused(pair: Callable[..., Pair]) -> None:
    for process in pair():
        again = Process(process.command, process.directory, output="again")
        assert again.wait() == 1
        assert send(process, CONFIG) is not None


def test_a_dead_ones_socket_is_replaced_by_pyvmm_only(pair: Callable[..., Pair]) -> None:
    for process, expected in zip(pair(), ("ends with 1", "runs"), strict=True):
        process.close()
        again = Process(process.command, process.directory, output="again")
        found = outcome(again, "Not started")
        again.close()
        assert found == expected
