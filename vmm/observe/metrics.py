# SPDX-License-Identifier: Apache-2.0
"""Metrics: Firecracker's, one JSON object a line, and the same counters in Prometheus' text format.

A line is written when the VM starts, every 60 seconds, when it ends, and by ``flush``, to a file or FIFO. A slow reader
never blocks the VMM. A count is what happened since the previous line; the counts of a lost line are in the next one.
Fields that pyvmm does not count are 0, because programs that read metrics expect them.

Source: Firecracker 1.12.1 as it runs (``tests/vmm/firecracker-1.12.1-metrics.json``); its docs/metrics.md; Prometheus'
text exposition format 0.0.4.
"""

from __future__ import annotations

import threading
import time

import msgspec

from vmm import __version__, logger
from vmm.errors import ConfigError, HostError
from vmm.exits import StopReason
from vmm.threads import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtio.device import VirtioDevice
    from virtio.mmio import VirtioMmio
    from virtio.net.device import Net
    from vmm.exits import Exit
    from vmm.machine.attach import Attached
    from vmm.machine.machine import Machine

    Values = dict[str, int]

PERIOD_SECONDS = 60.0
_LATENCY = ("min_us", "max_us", "sum_us")
# Groups and fields in the order in which they are written; a field with "*" is an aggregate of three.
FIELDS: dict[str, tuple[str, ...]] = {
    group: tuple(fields.split())
    for group, fields in {
        "api_server": "process_startup_time_us process_startup_time_cpu_us sync_response_fails "
        "sync_vmm_send_timeout_count",
        "balloon": "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count event_fails",
        "block": "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count flush_count "
        "queue_event_count rate_limiter_event_count update_count update_fails read_bytes write_bytes read_count "
        "write_count read_agg* write_agg* rate_limiter_throttled_events io_engine_throttled_events "
        "remaining_reqs_count",
        "deprecated_api": "deprecated_http_api_calls deprecated_cmd_line_api_calls",
        "get_api_requests": "instance_info_count machine_cfg_count mmds_count vmm_version_count",
        "i8042": "error_count missed_read_count missed_write_count read_count reset_count write_count",
        "uart": "error_count flush_count missed_read_count missed_write_count read_count write_count",
        "latencies_us": "full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm "
        "vmm_full_create_snapshot vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm",
        "logger": "missed_metrics_count metrics_fails missed_log_count log_fails",
        "mmds": "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_count tx_bytes tx_count tx_errors "
        "tx_frames connections_created connections_destroyed",
        "net": "activate_fails cfg_fails mac_address_updates no_rx_avail_buffer no_tx_avail_buffer event_fails "
        "rx_queue_event_count rx_event_rate_limiter_count rx_partial_writes rx_rate_limiter_throttled "
        "rx_tap_event_count rx_bytes_count rx_packets_count rx_fails rx_count tap_read_fails tap_write_fails "
        "tap_write_agg* tx_bytes_count tx_malformed_frames tx_fails tx_count tx_packets_count tx_partial_reads "
        "tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled tx_spoofed_mac_count "
        "tx_remaining_reqs_count",
        "patch_api_requests": "drive_count drive_fails network_count network_fails machine_cfg_count "
        "machine_cfg_fails mmds_count mmds_fails",
        "put_api_requests": "actions_count actions_fails boot_source_count boot_source_fails drive_count drive_fails "
        "logger_count logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count cpu_cfg_fails metrics_count "
        "metrics_fails network_count network_fails mmds_count mmds_fails vsock_count vsock_fails",
        "seccomp": "num_faults",
        "vcpu": "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures kvmclock_ctrl_fails exit_io_in_agg* "
        "exit_io_out_agg* exit_mmio_read_agg* exit_mmio_write_agg*",
        "vmm": "device_events panic_count",
        "signals": "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill",
        "vsock": "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails "
        "muxer_event_fails conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count tx_bytes_count "
        "rx_packets_count tx_packets_count conns_added conns_killed conns_removed killq_resync tx_flush_fails "
        "tx_write_fails rx_read_fails",
        "entropy": "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails "
        "entropy_rate_limiter_throttled rate_limiter_event_count",
        # Ours; only of a VM that has a network policy.
        "policy": "allowed allowed_bytes dropped dropped_bytes dropped_malformed dropped_protocol dropped_options "
        "dropped_fragment dropped_source dropped_special dropped_nameserver dropped_address resolver evicted dns_asked "
        "dns_answered dns_refused dns_failed dns_bad dns_limited dns_own dns_upstream dns_upstream_bad",
    }.items()
}
# Groups whose every field is a value, not a count; and single fields.
_STORED_GROUPS = {"latencies_us", "seccomp", "signals"}
_STORED = {
    ("api_server", "process_startup_time_us"), ("api_server", "process_startup_time_cpu_us"), ("vmm", "panic_count"),
}  # fmt: skip
_FAILURES = (StopReason.TRIPLE_FAULT, StopReason.INTERNAL_ERROR, StopReason.FAIL_ENTRY)


def _stored(group: str, field: str) -> bool:
    return (group in _STORED_GROUPS and field != "sigpipe") or (group, field) in _STORED


class Metrics:
    """The metrics of one VM, from before it is made to after its end; every method may be called by any thread.

    :param vmm_id: id of the VM, for Prometheus
    """

    def __init__(self, vmm_id: str = "anonymous-instance") -> None:
        self.vmm_id = vmm_id
        self._lock = threading.Lock()  # of what follows, and of the order of lines
        self._file: logger.LineFile | None = None
        self._machine: Machine | None = None
        self._own: dict[tuple[str, str], int] = {}
        self._sources: list[tuple[str, Callable[[], Values]]] = []
        self._written: dict[tuple[str, str], int] = {}
        self._end = threading.Event()
        self._timer: threading.Thread | None = None

    def configure(self, path: str) -> None:
        """Write lines to `path`, a file or FIFO that is there already; once.

        :raises ConfigError: the file cannot be written, or a path was set before
        """
        if self._file is not None:
            raise ConfigError("metrics_path", path, "cannot be set again")
        self._file = logger.LineFile.open("metrics_path", path)

    def count(self, group: str, field: str, by: int = 1) -> None:
        """Count something that happened.

        :raises KeyError: an unknown field
        """
        self._check(group, field)
        with self._lock:
            self._own[group, field] = self._own.get((group, field), 0) + by

    def store(self, group: str, field: str, value: int) -> None:
        """Set what is a value and no count, as a latency in microseconds.

        :raises KeyError: an unknown field
        """
        self._check(group, field)
        with self._lock:
            self._own[group, field] = value

    def _check(self, group: str, field: str) -> None:
        if field not in FIELDS.get(group, ()):
            raise KeyError(f"{group}.{field}")

    def report_start(
        self, start_time_us: int | None = None, start_time_cpu_us: int | None = None, parent_cpu_time_us: int = 0
    ) -> None:
        """Store how long the process took to come so far, from what its parent says of its beginning.

        :param start_time_us: CLOCK_MONOTONIC then
        :param start_time_cpu_us: CPU time of this process then
        :param parent_cpu_time_us: CPU time that the parent spent for it
        """
        if start_time_us is not None:
            self.store("api_server", "process_startup_time_us", max(0, time.monotonic_ns() // 1000 - start_time_us))
        if start_time_cpu_us is not None:
            spent = max(0, time.process_time_ns() // 1000 - start_time_cpu_us)
            self.store("api_server", "process_startup_time_cpu_us", spent + parent_cpu_time_us)

    def add_source(self, group: str, source: Callable[[], Values]) -> None:
        """Take fields of `group` from `source`, too, which returns what was counted in all; unknown names are left out.

        :param group: as ``mmds``; or of a device, as ``block_ID``, whose fields count for ``block`` too
        """
        with self._lock:
            self._sources.append((group, source))

    def attach(self, machine: Machine) -> None:
        """From here on count what `machine` does: a line now, one every 60 seconds, and one at its end."""
        self._machine = machine
        for attached in machine.devices.values():
            self._add_device(attached)
        for name, net in machine.nets.items():
            self.add_source("mmds", _named(net, "mmds_"))
            if "policy_allowed" in net.stats:
                self.add_source(f"policy_{name}", _named(net, "policy_", "dns_"))
        self.add_source("i8042", lambda: machine.i8042.stats)
        self.add_source("uart", lambda: {**machine.serial.stats, "missed_write_count": machine.console.lost})
        for index in range(len(machine.vcpus)):
            self.add_source("vcpu", _exits(machine, index))
        machine.on_exit(self._last)
        if self._file is not None:
            self._try()
            self._timer = spawn("metrics", "metrics", self._every_period)

    def _add_device(self, attached: Attached) -> None:
        kind = _KINDS.get(attached.kind)
        if kind is not None:
            group = f"{kind.group}_{attached.name}" if kind.per_device else kind.group
            self.add_source(group, lambda: kind.values(attached.device, attached.transport))

    def _every_period(self) -> None:
        while not self._end.wait(PERIOD_SECONDS):
            self._try()

    def _last(self, stop: Exit) -> None:
        if stop.reason in _FAILURES:
            self.count("vcpu", "failures")
        self.close()

    def close(self) -> None:
        """Write the last line; idempotent."""
        if not self._end.is_set():
            self._end.set()
            self._try()

    def _try(self) -> None:
        try:
            self.flush()
        except HostError as error:
            logger.error(f"Failed to write metrics: {error.strerror}")

    def flush(self) -> bool:
        """Write a line now.

        :returns: False: no path is configured
        :raises HostError: the line could not be written; ``logger.missed_metrics_count`` counts it
        """
        if self._file is None:
            return False
        with self._lock:
            values = self._values()
            if failed := self._file.put(msgspec.json.encode(self._line(values)) + b"\n"):
                key = "logger", "missed_metrics_count"
                self._own[key] = self._own.get(key, 0) + 1
                raise HostError(failed, "write metrics")
            self._written = values
        return True

    def _values(self) -> dict[tuple[str, str], int]:
        # All that was counted since the beginning, by group and field.
        values = dict(self._own)
        values["logger", "missed_log_count"] = logger.missed()
        for group, source in self._sources:
            whole = _whole(group)
            for field, value in source().items():
                if field in FIELDS[whole]:
                    values[group, field] = values.get((group, field), 0) + value
                    if group != whole:
                        values[whole, field] = values.get((whole, field), 0) + value
        return values

    def _line(self, values: dict[tuple[str, str], int]) -> dict[str, object]:
        line: dict[str, object] = {"utc_timestamp_ms": time.time_ns() // 1_000_000}
        for whole, fields in FIELDS.items():
            of_devices = sorted({group for group, _ in self._sources if group != whole == _whole(group)})
            for group in (*of_devices, whole) if of_devices or whole != "policy" else ():
                line[group] = dict(self._group(values, group, fields))
        return line

    def _group(
        self, values: dict[tuple[str, str], int], group: str, fields: tuple[str, ...]
    ) -> Iterator[tuple[str, object]]:
        for field in fields:
            if field.endswith("*"):
                yield field[:-1], dict.fromkeys(_LATENCY, 0)
                continue
            value = values.get((group, field), 0)
            yield field, value if _stored(group, field) else value - self._written.get((group, field), 0)

    def prometheus(self) -> str:
        """All that was counted since the beginning, for ``Content-Type: text/plain; version=0.0.4``."""
        with self._lock:
            values = self._values()
        families: dict[str, tuple[str, str, list[str]]] = {}

        def add(name: str, kind: str, about: str, value: int, /, **labels: str) -> None:
            text = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
            family = families.setdefault(name, (kind, about, []))
            family[2].append(f"{name}{{{text}}} {value}" if text else f"{name} {value}")

        machine = self._machine
        state = machine.state if machine else "Not started"
        add("pyvmm_info", "gauge", "What this is.", 1, id=self.vmm_id, state=state, version=__version__)
        for group, fields in FIELDS.items():
            if group in _DEVICE_GROUPS:
                continue
            for field in fields:
                if field.startswith("exit_"):
                    continue  # by vCPU, below
                stored = _stored(group, field)
                name = f"pyvmm_{group}_{field if stored else field.removesuffix('_count') + '_total'}"
                about = f"Firecracker's {group}.{field}."
                add(name, "gauge" if stored else "counter", about, values.get((group, field), 0))
        if machine is not None:
            for vcpu in machine.vcpus:
                for kind, count in vcpu.exits.items():
                    add("pyvmm_vcpu_exits_total", "counter", "KVM exits.", count, vcpu=str(vcpu.index), kind=kind)
            about = "Counted by virtio devices."
            for each in machine.devices.values():
                for counter, count in {**each.device.stats, **each.transport.stats}.items():
                    labels = {"device": each.device.name, "id": each.name}
                    add(f"pyvmm_virtio_{counter}_total", "counter", about, count, **labels)
        lines = []
        for name, (kind, about, samples) in families.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples]
        return "\n".join(lines) + "\n"


class _Kind:
    # What devices of a kind count, under Firecracker's names.
    def __init__(self, group: str, fields: str, *, per_device: bool = False) -> None:
        self.group = group
        self.per_device = per_device  # each device has a group of its own besides
        self._fields = [field.split("=") for field in fields.split()]

    def values(self, device: VirtioDevice, transport: VirtioMmio) -> Values:
        events = transport.notifications
        counts = {**device.stats, **{name: sum(events[queues]) for name, queues in _QUEUES.items()}}
        return {field: sum(counts.get(name, 0) for name in ours.split("+")) for field, ours in self._fields}


# How often drivers notified, of all queues or some.
_QUEUES = {
    "@all": slice(None), "@0": slice(0, 1), "@1": slice(1, 2), "@rx": slice(0, -1, 2), "@tx": slice(1, -1, 2),
}  # fmt: skip
# FIELD=COUNTER: Firecracker's, and ours, which are added up where there are several.
_KINDS = {
    "net": _Kind(
        "net",
        "event_fails=needs_reset rx_queue_event_count=@rx rx_rate_limiter_throttled=rx_rate_limiter_throttled "
        "rx_bytes_count=rx_bytes rx_packets_count=rx_packets rx_count=rx_packets "
        "rx_fails=rx_bad_buffers+rx_too_long tap_read_fails=rx_errors tap_write_fails=tx_errors "
        "tx_bytes_count=tx_bytes tx_malformed_frames=tx_bad tx_fails=tx_bad+tx_errors tx_count=tx_packets "
        "tx_packets_count=tx_packets tx_queue_event_count=@tx tx_rate_limiter_throttled=tx_rate_limiter_throttled",
        per_device=True,
    ),
    "drive": _Kind(
        "block",
        "execute_fails=io_errors invalid_reqs_count=bad_requests flush_count=flushes queue_event_count=@all "
        "event_fails=needs_reset update_count=updates read_bytes=bytes_read write_bytes=bytes_written "
        "read_count=reads write_count=writes rate_limiter_throttled_events=throttled",
        per_device=True,
    ),
    "entropy": _Kind(
        "entropy",
        "entropy_event_count=@0 entropy_event_fails=bad_requests+needs_reset entropy_bytes=bytes "
        "entropy_rate_limiter_throttled=throttled",
    ),
    "balloon": _Kind(
        "balloon",
        "inflate_count=@0 deflate_count=@1 stats_updates_count=stats_updates stats_update_fails=bad_stats "
        "event_fails=needs_reset",
    ),
    # Firecracker's rx is what the guest receives, its tx what it sends.
    "vsock": _Kind(
        "vsock",
        "rx_queue_event_count=@0 tx_queue_event_count=@1 rx_bytes_count=bytes_rx tx_bytes_count=bytes_tx "
        "rx_packets_count=packets_rx tx_packets_count=packets_tx conns_added=opened_by_guest+opened_by_host "
        "conns_killed=resets_sent conns_removed=closed tx_queue_event_fails=needs_reset",
    ),
}
_DEVICE_GROUPS = {"policy", *(kind.group for kind in _KINDS.values())}


def _named(net: Net, dropped: str, *kept: str) -> Callable[[], Values]:
    # What it counts under names that begin so, without `dropped`.
    names = (dropped, *kept)
    return lambda: {key.removeprefix(dropped): value for key, value in net.stats.items() if key.startswith(names)}


def _exits(machine: Machine, index: int) -> Callable[[], Values]:
    return lambda: {f"exit_{kind}": count for kind, count in machine.vcpus[index].exits.items()}


def _whole(group: str) -> str:
    return group if group in FIELDS else group.partition("_")[0]


def _escape(text: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text.replace("\\", "\\\\").replace('"', '\\"')
