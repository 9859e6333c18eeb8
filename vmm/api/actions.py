# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a VMM, one action at a time, by which request, and the state machine that does it or refuses.

Nothing of an action that was refused is applied. Source: Firecracker 1.12's behaviour, compared with the real one in
``tests/api/test_differential.py``.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import msgspec

from vmm import logger, threads
from vmm.api import API_VERSION, ApiError, refusing, translate, types
from vmm.api.bodies import decode
from vmm.cmdline import Cmdline
from vmm.config.devices import (
    BalloonConfig,
    EntropyConfig,
    MmdsConfig,
    NetConfig,
    ShareConfig,
    VsockConfig,
    check_amount,
)
from vmm.errors import ConfigError
from vmm.mmds.store import SIZE_LIMIT, Mmds, MmdsError
from vmm.observe.metrics import Metrics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from virtio.balloon import Balloon
    from virtio.vsock.device import Listener
    from vmm.kvm.vm import Vm
    from vmm.machine.machine import Machine
    from vmm.machine.snapshot import Image

    _Do = TypeVar("_Do", bound=Callable[..., object])

NOT_STARTED, RUNNING, PAUSED = "Not started", "Running", "Paused"
ANY, PRE_BOOT, CONFIGURING, POST_BOOT = "any", "pre-boot", "configuring", "post-boot"
_AFTER = "The requested operation is not supported after starting the microVM."
_BEFORE = "The requested operation is not supported before starting the microVM."
MAX_BOOT_ARGS = 2048  # COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h
SMT_RULE = "The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled."
# In memory: a jail has no files. ``tools/openapi.py`` makes it; ``tests/api/test_schema.py`` compares the two.
with open(os.path.join(os.path.dirname(__file__), "openapi.json"), "rb") as _file:
    OPENAPI = _file.read()
HUGE_RULE = "huge pages cannot be given back one by one, as a balloon does it"


class Route(msgspec.Struct, frozen=True):
    """An action, and the request that asks for it.

    :param action: its name; Firecracker's
    :param when: ``ANY``, ``PRE_BOOT``, ``POST_BOOT``, or ``CONFIGURING``, after which no snapshot is loaded
    :param do: the method of ``Vmm``
    :param method: GET, PUT or PATCH; empty: ``PUT /actions`` asks for it
    :param path: ``{name}`` stands for an id, which must be the body's field of that name
    :param body: type of the request's body, or None
    :param result: type of the answer's body, or None: 204
    """

    action: str
    when: str
    do: Callable[[Vmm, Any], object]
    method: str
    path: str
    body: Any
    result: Any


ACTIONS: dict[str, Route] = {}  # by name


def _asked(action: str, when: str, request: str = "", body: Any = None, result: Any = None) -> Callable[[_Do], _Do]:
    # Makes a method an action; `request` is method and path.
    method, _, path = request.partition(" ")

    def add(do: _Do) -> _Do:
        ACTIONS[action] = Route(action, when, do, method, path, body, result)
        return do

    return add


class Vmm:
    """One VM, from its configuration to its end; every call from any thread, one after the other.

    :param vmm_id: the instance's id
    :param on_start: called with the machine as soon as it runs
    :param boot_timer: the guest's machine has one
    :param mmds_limit: bytes of the metadata service's document

    The machine is owned: ``close`` ends it. ``metrics`` counts what is asked for, too.
    """

    def __init__(
        self,
        vmm_id: str = "anonymous-instance",
        *,
        on_start: Callable[[Machine], None] = lambda machine: None,
        boot_timer: bool = False,
        mmds_limit: int = SIZE_LIMIT,
    ) -> None:
        self.vmm_id = vmm_id
        self.metrics = Metrics(vmm_id)
        self.mmds = Mmds(limit=mmds_limit, instance_id=vmm_id)
        self._boot_timer = boot_timer
        self.machine: Machine | None = None
        self.lost = False  # a snapshot could not be loaded: the process ends once that was answered
        self.unsaved: list[tuple[int, int]] = []  # (guest address, bytes) that a snapshot which failed was to have
        self.configured = False  # with what a snapshot brings itself
        self._on_start = on_start
        self._lock = threading.RLock()
        self._listener: Listener | None = None
        self._prepared: Vm | None = None
        # As ``GET /vm/config`` shows it; before a boot source was given, with one that names no kernel.
        self.whole = types.VmConfiguration(
            boot_source=types.BootSource(kernel_image_path=""), machine_config=translate.DEFAULT_MACHINE
        )

    @property
    def state(self) -> str:
        """``Not started``, ``Running`` or ``Paused``."""
        if self.machine is None:
            return NOT_STARTED
        return PAUSED if self.machine.state == PAUSED else RUNNING

    def handle(self, action: str, body: Any = None) -> object:
        """Do it.

        :param action: the name of one of ``ACTIONS``
        :param body: its body, of the type that the action has
        :returns: the answer's body, or None
        :raises ApiError: the action is refused
        """
        route = ACTIONS[action]
        with self._lock:
            if route.when in (PRE_BOOT, CONFIGURING) and self.machine is not None:
                raise ApiError(_AFTER)
            if route.when == POST_BOOT and self.machine is None:
                raise ApiError(_BEFORE)
            self.configured |= route.when == CONFIGURING
            try:
                return route.do(self, body)
            except MmdsError as error:
                raise ApiError(str(error), error.status) from None

    def configure(self, whole: types.VmConfiguration) -> None:
        """Take a whole configuration, by the same actions as one after the other over the socket.

        :raises ApiError: something of it is refused
        """
        self.whole.pyvmm = whole.pyvmm
        for name, body in (
            ("ConfigureLogger", whole.logger),
            ("ConfigureMetrics", whole.metrics),
            ("ConfigureBootSource", whole.boot_source),
            ("PutMachineConfiguration", whole.machine_config),
            ("PutCpuConfiguration", _cpu_config_of(whole.cpu_config)),
            *(("InsertBlockDevice", drive) for drive in whole.drives),
            *(("InsertNetworkDevice", interface) for interface in whole.network_interfaces),
            ("SetMmdsConfiguration", whole.mmds_config),
            ("SetVsockDevice", whole.vsock),
            ("SetBalloonDevice", whole.balloon),
            ("SetEntropyDevice", whole.entropy),
            *(("InsertFsDevice", share) for share in (whole.fs or [])),
            ("ConfigureSerial", whole.serial or None),
        ):
            if body is not None:
                self.handle(name, body)

    def close(self) -> None:
        """End the VM and give everything back; idempotent."""
        if self.machine is not None:
            self.machine.close()
        elif self._listener is not None:
            self._listener.close()
        if self._prepared is not None:
            self._prepared.close()
            self._prepared.kvm.close()
            self._prepared = None

    def prepare(self) -> None:
        """Have KVM's part of a VM made while nobody waits for it; it has no memory yet."""
        from vmm.kvm.vm import prepare

        self._prepared = prepare()

    # What is told

    @_asked("GetVmInstanceInfo", ANY, "GET /", result=types.InstanceInfo)
    def _get_info(self, _: None) -> types.InstanceInfo:
        return types.InstanceInfo(
            id=self.vmm_id,
            state=self.state,  # type: ignore[arg-type]
            vmm_version=API_VERSION,
            app_name="Firecracker",
        )

    @_asked("GetVmmVersion", ANY, "GET /version", result=types.Version)
    def _get_version(self, _: None) -> types.Version:
        return types.Version(firecracker_version=API_VERSION)

    @_asked("GetVmMachineConfig", ANY, "GET /machine-config", result=types.MachineConfiguration)
    def _get_machine_config(self, _: None) -> types.MachineConfiguration:
        return self._machine_config

    @property
    def _machine_config(self) -> types.MachineConfiguration:
        return self.whole.machine_config or translate.DEFAULT_MACHINE

    @_asked("GetFullVmConfig", ANY, "GET /vm/config", result=types.VmConfiguration)
    def _get_whole(self, _: None) -> types.VmConfiguration:
        return self.whole

    # Before the start

    @_asked("ConfigureBootSource", CONFIGURING, "PUT /boot-source", types.BootSource)
    def _boot_source_is(self, body: types.BootSource) -> None:
        for what, path in (("kernel", body.kernel_image_path), ("initrd", body.initrd_path)):
            if path is None:
                continue
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            except (OSError, ValueError) as error:
                raise ApiError(f"Boot source error: The {what} file {path} cannot be opened: {_why(error)}") from None
        if len((body.boot_args or "").encode()) >= MAX_BOOT_ARGS:
            raise ApiError(f"Boot source error: boot_args: must be shorter than {MAX_BOOT_ARGS} bytes")
        with refusing("Boot source error: boot_args"):
            Cmdline(body.boot_args or "")
        self.whole.boot_source = body

    @_asked("PutMachineConfiguration", CONFIGURING, "PUT /machine-config", types.MachineConfiguration)
    def _machine_config_is(self, body: types.MachineConfiguration) -> None:
        balloon = self.whole.balloon
        with refusing("Machine config error"):
            if not 1 <= body.vcpu_count <= translate.MAX_VCPUS:
                raise ConfigError("vcpu_count", body.vcpu_count, f"must be 1 to {translate.MAX_VCPUS}")
            if body.smt and body.vcpu_count > 1 and body.vcpu_count % 2:
                raise ConfigError("vcpu_count", body.vcpu_count, SMT_RULE)
            if (template := body.cpu_template) not in (None, "None", msgspec.UNSET):
                raise ConfigError("cpu_template", template, "static templates are not supported; use /cpu-config")
            if not body.mem_size_mib or (body.huge_pages == "2M" and body.mem_size_mib % 2):
                raise ConfigError("mem_size_mib", body.mem_size_mib, "The memory size (MiB) is invalid.")
            if balloon is not None and balloon.amount_mib > body.mem_size_mib:
                raise ConfigError("mem_size_mib", body.mem_size_mib, f"the balloon is {balloon.amount_mib} MiB large")
            if balloon is not None and body.huge_pages != "None":
                raise ConfigError("huge_pages", body.huge_pages, HUGE_RULE)
        self.whole.machine_config = msgspec.structs.replace(body, cpu_template=msgspec.UNSET)  # it can only be "None"

    @_asked("UpdateMachineConfiguration", CONFIGURING, "PATCH /machine-config", types.MachineConfigurationUpdate)
    def _update_machine_config(self, body: types.MachineConfigurationUpdate) -> None:
        given = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not None}
        self._machine_config_is(msgspec.structs.replace(self._machine_config, **given))

    @_asked("PutCpuConfiguration", PRE_BOOT, "PUT /cpu-config", types.CpuConfig)
    def _cpu_config_is(self, body: types.CpuConfig) -> None:
        self.whole.cpu_config = body  # which has judged itself

    @_asked("InsertBlockDevice", CONFIGURING, "PUT /drives/{drive_id}", types.Drive)
    def _insert_drive(self, body: types.Drive) -> None:
        roots = [each for each in self.whole.drives if each.is_root_device and each.drive_id != body.drive_id]
        if body.is_root_device and roots:
            raise ApiError(f"Drive config error: A root block device already exists: {roots[0].drive_id}")
        with refusing("Drive config error"):
            from virtio.blk.device import Disk

            config = translate.drive(body)
            if config.format == "raw":
                Disk(
                    config.path, read_only=config.read_only, direct=config.direct, image_format="raw", any_size=True
                ).close()
        drives, shown = self.whole.drives, translate.shown_drive(body)
        index = next((index for index, each in enumerate(drives) if each.drive_id == body.drive_id), None)
        # The root device is the first, and one that becomes it changes places with what was, as in Firecracker.
        if index is None:
            drives.insert(0 if body.is_root_device else len(drives), shown)
        else:
            drives[index] = shown
            if body.is_root_device:
                drives[0], drives[index] = shown, drives[0]

    @_asked("InsertNetworkDevice", CONFIGURING, "PUT /network-interfaces/{iface_id}", types.NetworkInterface)
    def _insert_interface(self, body: types.NetworkInterface) -> None:
        others = [each for each in self.whole.network_interfaces if each.iface_id != body.iface_id]
        with refusing("Network config error"):
            config = translate.config_of(NetConfig, body)
            if body.guest_mac is not None:
                from virtio.net.device import parse_mac

                parse_mac(body.guest_mac)
                if body.guest_mac in [each.guest_mac for each in others]:
                    raise ConfigError("guest_mac", body.guest_mac, "The MAC address is already in use")
            if config.mode == "tap":
                if body.host_dev_name in [each.host_dev_name for each in others]:
                    raise ConfigError("host_dev_name", body.host_dev_name, "is the tap of another interface")
                from virtio.net.host import Tap

                Tap(config.tap or "", config.queues).close()
        shown = msgspec.structs.replace(
            body, rx_rate_limiter=translate.shown_limiter(body.rx_rate_limiter),
            tx_rate_limiter=translate.shown_limiter(body.tx_rate_limiter),
        )  # fmt: skip
        interfaces = self.whole.network_interfaces
        if len(others) < len(interfaces):  # the last one takes its position, as in Firecracker
            index = next(index for index, each in enumerate(interfaces) if each.iface_id == body.iface_id)
            interfaces[index] = interfaces[-1]
            interfaces.pop()
        interfaces.append(shown)

    @_asked("InsertFsDevice", CONFIGURING, "PUT /fs/{tag}", types.SharedFs)
    def _insert_share(self, body: types.SharedFs) -> None:
        with refusing("Filesystem config error"):
            config = translate.config_of(ShareConfig, body)
            if not os.path.isdir(config.path):
                raise ConfigError("shared_dir", config.path, "is not a directory")
        shown = msgspec.structs.replace(body, rate_limiter=translate.shown_limiter(body.rate_limiter))
        shares = {each.tag: each for each in self.whole.fs or []} | {body.tag: shown}
        self.whole.fs = list(shares.values())

    @_asked("SetVsockDevice", CONFIGURING, "PUT /vsock", types.Vsock)
    def _vsock_is(self, body: types.Vsock) -> None:
        from virtio.vsock.device import Listener

        with refusing("Vsock config error"):
            config = translate.config_of(VsockConfig, body)
            # Firecracker makes the socket now. The one before goes first: it may be of the same name.
            if self._listener is not None:
                self._listener.close()
                self._listener = None
                self.whole.vsock = None
            self._listener = Listener(config.path)
        self.whole.vsock = types.Vsock(guest_cid=body.guest_cid, uds_path=body.uds_path)

    @_asked("SetBalloonDevice", CONFIGURING, "PUT /balloon", types.Balloon)
    def _balloon_is(self, body: types.Balloon) -> None:
        with refusing("Balloon config error"):
            self._check_amount(body)
            if self._machine_config.huge_pages != "None":
                raise ConfigError("huge_pages", self._machine_config.huge_pages, HUGE_RULE)
            translate.config_of(BalloonConfig, body)
        self.whole.balloon = body

    def _check_amount(self, body: types.Balloon | types.BalloonUpdate) -> None:
        check_amount(body.amount_mib, self._machine_config.mem_size_mib)

    @_asked("SetEntropyDevice", CONFIGURING, "PUT /entropy", types.EntropyDevice)
    def _entropy_is(self, body: types.EntropyDevice) -> None:
        with refusing("Entropy device error"):
            translate.config_of(EntropyConfig, body)
        self.whole.entropy = types.EntropyDevice(rate_limiter=translate.shown_limiter(body.rate_limiter))

    @_asked("ConfigureLogger", PRE_BOOT, "PUT /logger", types.Logger)
    def _logger_is(self, body: types.Logger) -> None:
        with refusing("Logger error"):
            logger.configure(**msgspec.structs.asdict(body), vmm_id=self.vmm_id)
        self.whole.logger = body

    @_asked("ConfigureMetrics", PRE_BOOT, "PUT /metrics", types.Metrics)
    def _metrics_is(self, body: types.Metrics) -> None:
        with refusing("Metrics error"):
            self.metrics.configure(body.metrics_path)
        self.whole.metrics = body

    @_asked("ConfigureSerial", PRE_BOOT, "PUT /serial", types.Serial)
    def _serial_is(self, body: types.Serial) -> None:
        with refusing("Serial error"):
            if body.serial_out_path is not None:
                logger.LineFile.open("serial_out_path", body.serial_out_path).close()
        self.whole.serial = body

    @_asked("GetOpenApi", ANY, "GET /openapi.json", result=Any)
    def _openapi(self, _: None) -> object:
        return msgspec.Raw(OPENAPI)

    @_asked("GetPrometheusMetrics", ANY, "GET /metrics/prometheus", result=str)
    def _prometheus(self, _: None) -> str:
        return self.metrics.prometheus()

    @_asked("DoAction", ANY, "PUT /actions", types.Action)
    def _act(self, body: types.Action) -> None:
        self.handle("StartMicroVm" if body.action_type == "InstanceStart" else body.action_type, body)

    @_asked("StartMicroVm", PRE_BOOT)
    def _start(self, _: types.Action) -> None:
        from vmm.kvm.vm import why_no_linux
        from vmm.machine.machine import Machine

        if not self.whole.boot_source.kernel_image_path:
            raise ApiError("Start microvm error: Cannot start microvm without kernel configuration.")
        with refusing("Start microvm error"):
            config = translate.vm_config(self.whole)
            config.boot_timer = self._boot_timer
            config.keyboard = True
            prepared, self._prepared = self._prepared, None
            # The machine's, also if it cannot be made: then the next one makes the socket again.
            listener, self._listener = self._listener, None
            machine = Machine(
                config, listener=listener, metadata=self.mmds, prepared=prepared, seccomp=threads.guard is not None
            )
            if (why := why_no_linux()) and machine.loaded.needs_ring0:
                logger.warn(f"{config.kvm} {why}")
            self._run(machine)

    def _run(self, machine: Machine, *, paused: bool = False) -> None:
        self.machine = machine
        self.metrics.attach(machine)
        try:
            machine.start(paused=paused)
        finally:
            self._on_start(machine)  # who waits for its end hears of a start that failed, too

    # While it runs

    def _running(self) -> Machine:
        assert self.machine is not None  # handle() has seen to it
        return self.machine

    @_asked("SetVmState", POST_BOOT, "PATCH /vm", types.VmState)
    def _set_state(self, body: types.VmState) -> None:
        machine, begun = self._running(), time.monotonic_ns()
        if body.state == "Resumed":
            machine.resume()
        elif machine.state != PAUSED:
            with refusing("Internal VMM error"):
                machine.pause()
        field = "pause_vm" if body.state == "Paused" else "resume_vm"
        self.metrics.store("latencies_us", field, (time.monotonic_ns() - begun) // 1000)

    @_asked("FlushMetrics", POST_BOOT)
    def _flush_metrics(self, _: types.Action) -> None:
        with refusing("Internal VMM error: Metrics error"):
            self.metrics.flush()  # where no path was configured, nothing is written, and that is no error

    @_asked("SendCtrlAltDel", POST_BOOT)
    def _ctrl_alt_del(self, _: types.Action) -> None:
        with refusing("Internal VMM error"):
            self._running().send_ctrl_alt_del()

    @_asked("UpdateBlockDevice", POST_BOOT, "PATCH /drives/{drive_id}", types.PartialDrive)
    def _update_drive(self, body: types.PartialDrive) -> None:
        block = self._running().blocks.get(body.drive_id)
        if block is None:
            raise ApiError(f"Drive config error: drive_id {body.drive_id}: there is no such drive")
        if body.path_on_host is None and body.rate_limiter is None:
            raise ApiError("Drive config error: nothing to update; give path_on_host or rate_limiter")
        shown = next(each for each in self.whole.drives if each.drive_id == body.drive_id)
        with refusing("Drive config error"):
            if body.path_on_host is not None:
                block.replace(body.path_on_host)
                shown.path_on_host = body.path_on_host
            _limit(body, shown, "rate_limiter", block.set_rate_limit)

    @_asked("UpdateNetworkInterface", POST_BOOT, "PATCH /network-interfaces/{iface_id}", types.PartialNetworkInterface)
    def _update_interface(self, body: types.PartialNetworkInterface) -> None:
        net = self._running().nets.get(body.iface_id)
        if net is None:
            raise ApiError(f"Network config error: iface_id {body.iface_id}: there is no such interface")
        shown = next(each for each in self.whole.network_interfaces if each.iface_id == body.iface_id)
        with refusing("Network config error"):
            _limit(body, shown, "rx_rate_limiter", lambda *buckets: net.set_rate_limit(net.rx_limiter, *buckets))
            _limit(body, shown, "tx_rate_limiter", lambda *buckets: net.set_rate_limit(net.tx_limiter, *buckets))

    @_asked("UpdateFsDevice", POST_BOOT, "PATCH /fs/{tag}", types.PartialFs)
    def _update_share(self, body: types.PartialFs) -> None:
        fs = self._running().shares.get(body.tag)
        if fs is None:
            raise ApiError(f"Filesystem config error: tag {body.tag}: there is no such share")
        shown = next(each for each in self.whole.fs or [] if each.tag == body.tag)
        with refusing("Filesystem config error"):
            _limit(body, shown, "rate_limiter", fs.set_rate_limit)

    # The balloon

    @_asked("GetBalloonConfig", ANY, "GET /balloon", result=types.Balloon)
    def _get_balloon(self, _: None) -> types.Balloon:
        if self.whole.balloon is None:
            raise ApiError("Balloon config error: there is no balloon")
        return self.whole.balloon

    def _balloon(self) -> tuple[types.Balloon, Balloon]:
        shown, device = self._get_balloon(None), self._running().balloon
        assert device is not None
        return shown, device

    @_asked("UpdateBalloon", POST_BOOT, "PATCH /balloon", types.BalloonUpdate)
    def _update_balloon(self, body: types.BalloonUpdate) -> None:
        shown, device = self._balloon()
        with refusing("Balloon config error"):
            self._check_amount(body)
            device.set_amount(body.amount_mib)
        shown.amount_mib = body.amount_mib

    @_asked("GetBalloonStats", POST_BOOT, "GET /balloon/statistics", result=types.BalloonStats)
    def _get_balloon_stats(self, _: None) -> types.BalloonStats:
        shown, device = self._balloon()
        if not shown.stats_polling_interval_s:
            raise ApiError("Balloon config error: statistics are not enabled; stats_polling_interval_s is 0")
        return types.BalloonStats(**device.statistics())

    @_asked("UpdateBalloonStatistics", POST_BOOT, "PATCH /balloon/statistics", types.BalloonStatsUpdate)
    def _update_balloon_stats(self, body: types.BalloonStatsUpdate) -> None:
        shown, device = self._balloon()
        with refusing("Balloon config error"):
            device.set_polling_interval(body.stats_polling_interval_s)
        shown.stats_polling_interval_s = body.stats_polling_interval_s

    # The metadata service

    @_asked("SetMmdsConfiguration", CONFIGURING, "PUT /mmds/config", types.MmdsConfig)
    def _mmds_config_is(self, body: types.MmdsConfig) -> None:
        with refusing("MMMDS config error"):
            config = translate.config_of(MmdsConfig, body)
            known = [each.iface_id for each in self.whole.network_interfaces]
            if unknown := [name for name in config.interfaces if name not in known]:
                raise ConfigError("network_interfaces", unknown[0], "does not correspond to any network interface")
        self.mmds.configure(config)
        self.whole.mmds_config = body

    @_asked("GetMMDS", ANY, "GET /mmds", result=Any)
    def _get_mmds(self, _: None) -> object:
        return self.mmds.get()

    @_asked("PutMMDS", ANY, "PUT /mmds", Any)
    def _put_mmds(self, body: Any) -> None:
        self.mmds.put(body)

    @_asked("PatchMMDS", ANY, "PATCH /mmds", Any)
    def _patch_mmds(self, body: Any) -> None:
        self.mmds.patch(body)

    # Snapshots

    @_asked("CreateSnapshot", POST_BOOT, "PUT /snapshot/create", types.SnapshotCreate)
    def _create_snapshot(self, body: types.SnapshotCreate) -> None:
        from vmm.api.snapshots import create

        create(self, self._running(), body)

    @_asked("LoadSnapshot", PRE_BOOT, "PUT /snapshot/load", types.SnapshotLoad)
    def _load_snapshot(self, body: types.SnapshotLoad) -> None:
        from vmm.api.snapshots import load

        load(self, body)

    def go_on(self, image: Image, shown: types.VmConfiguration, *, resume: bool) -> None:
        """Make the machine of `image` this VMM's.

        :param shown: its configuration, for those who ask
        :param resume: it runs; False: it is paused
        :raises VmmError: the machine cannot be made
        """
        from vmm.machine.machine import Machine

        shown.logger, shown.metrics, shown.serial = self.whole.logger, self.whole.metrics, self.whole.serial
        self.whole = shown
        image.config = image.config.replaced(**translate.console_of(shown))
        self._run(Machine(image=image, metadata=self.mmds, seccomp=threads.guard is not None), paused=not resume)


def _limit(body: Any, shown: Any, field: str, change: Callable[..., None]) -> None:
    # Limits of a running device, if the body has any; a bucket that it does not have stays as it is.
    if (limits := getattr(body, field)) is not None:
        change(translate.bucket(limits.bandwidth), translate.bucket(limits.ops))
        setattr(shown, field, translate.shown_limiter(limits, getattr(shown, field)))


def _cpu_config_of(config: types.CpuConfig | str | None) -> types.CpuConfig | None:
    # A configuration file has it, or the path of the file that has.
    if not isinstance(config, str):
        return config
    try:
        with open(config, "rb") as file:
            body: types.CpuConfig = decode(types.CpuConfig, file.read())
    except (OSError, ValueError) as error:
        raise ApiError(f"Configure CPU error: {config}: {_why(error)}") from None
    return body


def _why(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
