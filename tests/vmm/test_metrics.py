# SPDX-License-Identifier: Apache-2.0
"""Metrics: the tree of Firecracker 1.12.1, counts since the line before, readers that are absent, Prometheus' text."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.logs import forget_log
from virtio.rng import Entropy
from vmm import logger
from vmm.errors import ConfigError, HostError
from vmm.exits import Exit, StopReason
from vmm.observe import metrics
from vmm.observe.metrics import Metrics

# What the real one wrote with a drive "disk0", a drive "_2" and an interface "eth0", in its order.
FIRECRACKER = json.loads(Path(__file__).with_name("firecracker-1.12.1-metrics.json").read_text())


class FakeTransport:
    def __init__(self, device: FakeDevice, notifications: tuple[int, ...]) -> None:
        self.device = device
        self.notifications = notifications
        self.stats: dict[str, int] = {}


class FakeDevice:
    def __init__(self, kind: str, name: str, **stats: int) -> None:
        self.kind = kind
        self.name = name
        self.stats = {"needs_reset": 0, "bad_requests": 0, **stats}


BLOCK = dict(io_errors=0, flushes=0, bytes_read=0, bytes_written=0, reads=0, writes=0, throttled=0)
NET = dict(rx_rate_limiter_throttled=0, tx_rate_limiter_throttled=0)


class Named:
    def __init__(self, **names: object) -> None:
        self.__dict__.update(names)


class FakeMachine:
    """As much of a Machine as metrics look at."""

    def __init__(self, *devices: FakeDevice, events: tuple[int, ...] = (0, 0, 0)) -> None:
        self.virtio = [FakeTransport(device, events) for device in devices]
        blocks, nets = (
            [each for each in devices if getattr(each, "kind", "entropy") == kind] for kind in ("drive", "net")
        )
        self.blocks = dict(zip(("disk0", "_2"), blocks, strict=False))
        self.nets = dict(zip(("eth0",), nets, strict=False))
        ids = {device.name: name for name, device in {**self.blocks, **self.nets}.items()}
        self.devices = {
            each.device.name: Named(
                kind=getattr(each.device, "kind", "entropy"), name=ids.get(each.device.name, each.device.name),
                device=each.device, transport=each,
            )
            for each in self.virtio
        }  # fmt: skip
        self.i8042 = Named(stats={"read_count": 0, "reset_count": 0})
        self.serial = Named(stats={"read_count": 0, "write_count": 0})
        self.console = Named(lost=0)
        self.vcpus = [Named(index=n, exits={"io_in": 0, "io_out": 0, "mmio_read": 0, "mmio_write": 0}) for n in (0, 1)]
        self.state = "Running"
        self.callbacks: list[Callable[[Exit], None]] = []

    def on_exit(self, callback: Callable[[Exit], None]) -> None:
        self.callbacks.append(callback)

    def end(self, reason: StopReason) -> None:
        for callback in self.callbacks:
            callback(Exit(reason))


class Reader:
    """Metrics that write to a file, and the lines there."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path = path
        self.metrics = Metrics("vm1")
        self.metrics.configure(str(path))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def flush(self) -> dict[str, Any]:
        assert self.metrics.flush()
        return self.lines[-1]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path / "metrics")
    yield reader
    reader.metrics.close()
    forget_log()


def paths(tree: dict[str, Any], before: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += paths(value, f"{before}{key}.") if isinstance(value, dict) else [before + key]
    return found


def devices() -> list[FakeDevice]:
    return [
        FakeDevice("drive", "virtio-blk0", **BLOCK),
        FakeDevice("drive", "virtio-blk1", **BLOCK),
        FakeDevice("net", "virtio-net0", **NET),
    ]


def test_tree_is_that_of_firecracker_in_its_order(reader: Reader) -> None:
    reader.metrics.attach(FakeMachine(*devices()))  # type: ignore[arg-type]
    assert paths(reader.lines[0]) == FIRECRACKER


def test_line_is_compact_json_with_the_time(reader: Reader) -> None:
    before = time.time_ns() // 1_000_000
    assert before <= reader.flush()["utc_timestamp_ms"] <= time.time_ns() // 1_000_000
    text = reader.path.read_text()
    assert text.startswith('{"utc_timestamp_ms":')
    assert " " not in text
    assert text.endswith("}\n")


def test_counts_are_since_the_line_before(reader: Reader) -> None:
    reader.metrics.count("put_api_requests", "drive_count")
    reader.metrics.count("put_api_requests", "drive_count", 2)
    assert reader.flush()["put_api_requests"]["drive_count"] == 3
    reader.metrics.count("put_api_requests", "drive_count")
    assert reader.flush()["put_api_requests"]["drive_count"] == 1
    assert reader.flush()["put_api_requests"]["drive_count"] == 0


def test_stored_values_stay(reader: Reader) -> None:
    reader.metrics.store("latencies_us", "pause_vm", 261)
    reader.metrics.store("signals", "sigbus", 1)
    for _ in range(2):
        line = reader.flush()
        assert line["latencies_us"]["pause_vm"] == 261
        assert line["signals"]["sigbus"] == 1


@pytest.mark.parametrize(("group", "field"), [("nope", "x"), ("block", "nope"), ("vcpu", "exit_io_in_agg")])
def test_unknown_field_is_a_mistake(group: str, field: str) -> None:
    with pytest.raises(KeyError, match=f"{group}.{field}"):
        Metrics().count(group, field)
    with pytest.raises(KeyError):
        Metrics().store(group, field, 1)


def test_devices_count_for_themselves_and_for_all(reader: Reader) -> None:
    machine = FakeMachine(*devices(), events=(7, 5, 0))
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    first, second, net = (transport.device for transport in machine.virtio)
    first.stats.update(reads=2, bytes_read=8192, throttled=1)
    second.stats.update(reads=1, bytes_read=512, io_errors=4)
    net.stats.update(rx_packets=3, rx_bytes=180, tx_packets=1, tx_bytes=60)
    line = reader.flush()
    assert (line["block_disk0"]["read_count"], line["block_disk0"]["read_bytes"]) == (2, 8192)
    assert line["block_disk0"]["rate_limiter_throttled_events"] == 1
    assert (line["block__2"]["read_count"], line["block__2"]["execute_fails"]) == (1, 4)
    assert (line["block"]["read_count"], line["block"]["read_bytes"], line["block"]["execute_fails"]) == (3, 8704, 4)
    assert line["net_eth0"] == line["net"]
    assert (line["net"]["rx_bytes_count"], line["net"]["tx_packets_count"]) == (180, 1)
    assert (line["net"]["rx_queue_event_count"], line["net"]["tx_queue_event_count"]) == (0, 0)  # 7 and 5 were told
    assert reader.lines[0]["net"]["rx_queue_event_count"] == 7
    assert reader.lines[0]["block"]["queue_event_count"] == 24
    assert reader.flush()["block"]["read_count"] == 0


def test_cpus_serial_port_and_keyboard_are_counted(reader: Reader) -> None:
    machine = FakeMachine()
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    machine.vcpus[0].exits["io_out"] = 5  # type: ignore[attr-defined]
    machine.vcpus[1].exits["io_out"] = 1  # type: ignore[attr-defined]
    machine.serial.stats["write_count"] = 4  # type: ignore[attr-defined]
    machine.console.lost = 9  # type: ignore[attr-defined]
    machine.i8042.stats["read_count"] = 2  # type: ignore[attr-defined]
    line = reader.flush()
    assert line["vcpu"]["exit_io_out"] == 6
    assert (line["uart"]["write_count"], line["uart"]["missed_write_count"]) == (4, 9)
    assert line["i8042"]["read_count"] == 2


def test_real_device_feeds_its_group(reader: Reader) -> None:
    device = Entropy()
    device.counters["bytes"] = 64
    machine = FakeMachine(device, events=(3,))  # type: ignore[arg-type]
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    entropy = reader.lines[0]["entropy"]
    assert (entropy["entropy_bytes"], entropy["entropy_event_count"]) == (64, 3)


def test_source_of_somebody_else(reader: Reader) -> None:
    counters = {"rx_count": 3, "internal": 1}
    reader.metrics.add_source("mmds", lambda: counters)
    assert reader.flush()["mmds"]["rx_count"] == 3
    counters["rx_count"] = 5
    line = reader.flush()
    assert line["mmds"]["rx_count"] == 2
    assert "internal" not in line["mmds"]


def test_metadata_service_counts_in_every_interface(reader: Reader) -> None:
    nets = [FakeDevice("net", f"virtio-net{n}", **NET, mmds_rx_accepted=2, mmds_errors=1) for n in (0, 1)]
    machine = FakeMachine(*nets)
    machine.nets = dict(zip(("eth0", "eth1"), nets, strict=True))
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    assert reader.lines[0]["mmds"]["rx_accepted"] == 4


def test_a_network_policy_has_groups_of_its_own(reader: Reader) -> None:
    nets = [
        FakeDevice("net", f"virtio-net{n}", **NET, policy_allowed=2, policy_dropped_address=n, dns_asked=1)
        for n in (0, 1)
    ]
    machine = FakeMachine(*nets)
    machine.nets = dict(zip(("eth0", "eth1"), nets, strict=True))
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    line = reader.lines[0]
    assert list(line)[-3:] == ["policy_eth0", "policy_eth1", "policy"]
    assert (line["policy_eth1"]["dropped_address"], line["policy_eth0"]["dropped_address"]) == (1, 0)
    assert (line["policy"]["allowed"], line["policy"]["dns_asked"], line["policy"]["dns_failed"]) == (4, 2, 0)
    assert [path for path in paths(line) if not path.startswith(("policy", "net_"))] == [
        path for path in FIRECRACKER if not path.startswith(("net_", "block_"))
    ]
    assert "pyvmm_policy" not in reader.metrics.prometheus()  # there every counter of a device is, by its own name
    nets[0].stats["policy_allowed"] = 5
    assert reader.flush()["policy"]["allowed"] == 3


def test_lines_at_start_every_period_and_at_the_end(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PERIOD_SECONDS", 0.01)
    machine = FakeMachine()
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    while reader.path.read_bytes().count(b"\n") < 4:
        time.sleep(0.005)
    machine.end(StopReason.POWEROFF)
    assert reader.metrics._timer is not None
    reader.metrics._timer.join(30)
    after = len(reader.lines)
    reader.metrics.close()
    assert len(reader.lines) == after


@pytest.mark.parametrize("reason", [StopReason.TRIPLE_FAULT, StopReason.INTERNAL_ERROR, StopReason.FAIL_ENTRY])
def test_vcpu_that_failed_is_in_the_last_line(reader: Reader, reason: StopReason) -> None:
    machine = FakeMachine()
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    machine.end(reason)
    assert [line["vcpu"]["failures"] for line in reader.lines] == [0, 1]


def test_without_a_path_nothing_is_written_and_no_thread_runs() -> None:
    counted = Metrics()
    counted.attach(FakeMachine())  # type: ignore[arg-type]
    assert not counted.flush()
    assert counted._timer is None


def test_path_is_set_once(reader: Reader) -> None:
    with pytest.raises(ConfigError, match="cannot be set again"):
        reader.metrics.configure(str(reader.path))


def test_path_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics_path .*must be an existing, writable file or FIFO"):
        Metrics().configure(str(tmp_path / "none"))


def test_full_fifo_loses_nothing_that_was_counted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    counted = Metrics()
    counted.configure(str(tmp_path / "fifo"))
    fails = 0
    for _ in range(30):
        counted.count("get_api_requests", "instance_info_count")
        try:
            counted.flush()
        except HostError as error:
            assert error.strerror == "Resource temporarily unavailable"
            fails += 1
    assert 0 < fails < 30
    with open(os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as end:

        def read() -> list[bytes]:
            data = b""
            while part := end.read(1 << 16):
                data += part
            return data.splitlines()

        lines = read()
        assert counted.flush()
        told = [json.loads(line) for line in lines + read()]
    assert len(told) == 31 - fails
    assert sum(line["get_api_requests"]["instance_info_count"] for line in told) == 30
    assert told[-1]["logger"]["missed_metrics_count"] == fails


def test_full_disk_is_logged_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    logger.configure(log_path=str(tmp_path / "log"))
    counted = Metrics()
    counted.configure("/dev/full")
    counted.attach(FakeMachine())  # type: ignore[arg-type]
    counted.close()
    assert (tmp_path / "log").read_text().endswith("Failed to write metrics: No space left on device\n")
    forget_log()


def test_start_is_measured_from_what_the_parent_says(reader: Reader) -> None:
    now = time.monotonic_ns() // 1000
    reader.metrics.report_start(now - 5_000_000, 0, 7_000_000)
    line = reader.flush()["api_server"]
    assert 5_000_000 <= line["process_startup_time_us"] < 65_000_000
    assert 7_000_000 <= line["process_startup_time_cpu_us"]


def test_lost_log_lines_are_counted(reader: Reader) -> None:
    logger.configure(log_path="/dev/full")
    logger.error("x")
    assert reader.flush()["logger"]["missed_log_count"] == 1
    assert reader.flush()["logger"]["missed_log_count"] == 0


def test_odd_names_are_still_json(reader: Reader) -> None:
    machine = FakeMachine(*devices())
    disk = next(each for each in machine.devices.values() if vars(each)["name"] == "disk0")
    vars(disk)["name"] = 'a"\\b\n\x01'
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    assert any(group.startswith('block_a"') for group in reader.lines[0])


def parse_prometheus(text: str) -> dict[str, float]:
    """Samples by name and labels, of the text exposition format 0.0.4; every one has had its HELP and TYPE."""
    import re

    samples: dict[str, float] = {}
    typed: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in typed and kind in ("counter", "gauge")
            typed[name] = kind
        elif not line.startswith("# HELP "):
            match = re.fullmatch(r'([a-z_][a-z0-9_]*)(\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+\})? (\d+)', line)
            assert match, line
            assert match[1] in typed
            assert match[1].endswith("_total") == (typed[match[1]] == "counter")
            assert match[1] + (match[2] or "") not in samples
            samples[match[1] + (match[2] or "")] = float(match[3])
    return samples


def test_prometheus_has_what_was_counted_in_all(reader: Reader) -> None:
    machine = FakeMachine(*devices())
    reader.metrics.attach(machine)  # type: ignore[arg-type]
    reader.metrics.count("put_api_requests", "actions_count")
    machine.virtio[1].device.stats["reads"] = 4
    machine.vcpus[1].exits["mmio_read"] = 6  # type: ignore[attr-defined]
    reader.flush()
    reader.metrics.count("put_api_requests", "actions_count")
    samples = parse_prometheus(reader.metrics.prometheus())
    assert samples["pyvmm_put_api_requests_actions_total"] == 2
    assert samples['pyvmm_virtio_reads_total{device="virtio-blk1",id="_2"}'] == 4
    assert samples['pyvmm_vcpu_exits_total{vcpu="1",kind="mmio_read"}'] == 6
    assert samples["pyvmm_latencies_us_pause_vm"] == 0
    assert any(name.startswith('pyvmm_info{id="vm1",state="Running",') for name in samples)


def test_prometheus_answers_before_there_is_a_machine() -> None:
    assert parse_prometheus(Metrics('a"b\\c\nd').prometheus())
