# SPDX-License-Identifier: Apache-2.0
"""A whole machine: the only file that knows every room. Builds it, starts, pauses and ends it.

with Machine(kernel="vmlinux", memory="512M", console="stdio") as vm:
    vm.start()
    print(vm.wait())
"""

from __future__ import annotations

import errno
import os
import threading

from boot import acpi, cpu, layout, load, mptable
from boot.cmdline import Cmdline
from devices._serial import Serial
from devices.acpi_events import EVENTS_PORT, GENERATION_CHANGED, POWER_BUTTON, AcpiEvents
from devices.exit_port import ExitPort
from devices.i8042 import I8042
from devices.pit import PIT_PORT, PIT_PORTS, SPEAKER_PORT, Pit
from devices.power import AcpiPower
from devices.pvpanic import PvPanic
from devices.rtc import Rtc
from vmm import kvm_abi as abi
from vmm import logger, threads
from vmm._bus import Bus
from vmm.config import VmConfig
from vmm.console import Console
from vmm.errors import ConfigError, HostError, KvmError, SnapshotError, VmmError
from vmm.events import Stop, StopReason
from vmm.irq import IrqLine
from vmm.kvm import Kvm, Vm
from vmm.memory import GuestMemory
from vmm.signals import Bell
from vmm.vcpu import Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any, Protocol, TypeVar

    from virtio._fs_dax import Window
    from virtio.balloon import Balloon
    from virtio.blk import Block
    from virtio.console import ConsolePort
    from virtio.device import VirtioDevice
    from virtio.fs import Fs
    from virtio.mmio import VirtioMmio
    from virtio.net import Net
    from virtio.vsock import Listener
    from vmm.device_config import NetConfig
    from vmm.mmds import Mmds
    from vmm.snapshot import Image

    class Closable(Protocol):
        def close(self) -> None: ...

    _T = TypeVar("_T", bound=Closable)

# Interrupt lines for virtio-mmio: the IOAPIC's 24 less those of the timer, the keyboard, the cascade, the serial ports
# and the RTC; the FPU's, which no 64-bit kernel uses, last.
VIRTIO_GSIS = (5, 6, 7, 9, 10, 11, 12, *range(14, 24), 13)
SERIAL_PORT = 0x3F8
SERIAL_GSI = 4
KEYBOARD_GSI = 1
EVENTS_GSI = 13  # the FPU's, which has none


class Machine:
    """A virtual machine: made whole by the constructor, run by ``start``, ended by ``close``. A context manager.

    :param config: what it is to be; or give ``VmConfig``'s own parameters by name
    :param devices: virtio devices of your own, after the configured ones; yours to close
    :param listener: the socket device's, made before; owned from here on. None: it is made from the configuration
    :param metadata: the metadata service's document, made before, which is ``mmds`` then. None: an empty one
    :param image: another machine, frozen: this one goes on where that one was; `config` None: with its configuration
    :param prepared: from ``vmm.kvm.prepare``, used if it is of this configuration's KVM; owned from here on
    :raises ConfigError: the configuration, a file of it or the host's /dev/kvm cannot be used
    :raises HostError: the host failed

    ``memory`` (:class:`vmm.memory.GuestMemory`), ``pio`` and ``mmio`` (:class:`vmm.bus.Bus`), ``vcpus``
    (:class:`vmm.vcpu.Vcpu`), ``loaded`` (:class:`boot.load.Loaded`) and ``cmdline`` are there to be looked at; a bus
    device of your own is added by ``vm.pio.add(port, size, device, name)``. ``blocks``, ``nets`` and ``shares`` hold
    those devices by their ``drive_id``, ``iface_id`` and ``tag``, ``balloon`` that one or None, ``mmds``
    (:class:`vmm.mmds.Mmds`) is the metadata service's document; all to be changed while the guest runs.
    """

    def __init__(
        self,
        config: VmConfig | None = None,
        /,
        *,
        devices: Sequence[VirtioDevice] = (),
        listener: Listener | None = None,
        metadata: Mmds | None = None,
        image: Image | None = None,
        prepared: Vm | None = None,
        **settings: object,
    ) -> None:
        if config is None and image is not None:
            config = image.config
        if config is None:
            config = VmConfig(**settings)  # type: ignore[arg-type]  # checked by VmConfig itself
        elif settings:
            raise TypeError("Machine takes a VmConfig or its parameters, not both")
        self.config = config
        self.vcpus: tuple[Vcpu, ...] = ()
        self.virtio: tuple[VirtioMmio, ...] = ()
        self.blocks: dict[str, Block] = {}
        self.nets: dict[str, Net] = {}
        self.shares: dict[str, Fs] = {}
        self.balloon: Balloon | None = None
        self._listener = listener
        self._mmds = metadata
        self._windows: tuple[Window, ...] = ()
        self._hvc: ConsolePort | None = None
        self._closers: list[Callable[[], None]] = []
        self._threads: list[threading.Thread] = []
        self._exit_callbacks: list[Callable[[Stop], None]] = []
        self._console_callbacks: list[Callable[[bytes], None]] = []
        self._change = threading.Condition()
        self._bells: list[Bell] = []  # of the main thread's wait(), inside `_change`
        self._started = False
        self._holds: set[str] = set()  # why the vCPUs are held: each reason until it is released
        self._parked = 0
        self.children = 0  # made by ``fork``, for the names of their sockets
        self.closed = False
        self._clock = b""  # the image's, of a machine that was made of one
        self._stop: Stop | None = None
        self._failure: BaseException | None = None
        try:
            self._build(devices, image, prepared)
        except BaseException:
            self.close()
            raise

    # Building: in the order in which a user's mistake is cheapest to find.

    def _build(self, devices: Sequence[VirtioDevice], image: Image | None, prepared: Vm | None) -> None:
        config = self.config
        if prepared is not None:
            self._owned(prepared.kvm)
            self._owned(prepared)
        timer = None
        if config.boot_timer:
            from devices.boot_timer import BootTimer

            timer = BootTimer()
        configured = self._virtio_devices()
        self.configured = len(configured)  # of ``virtio``: the first ones; the others are the embedding program's
        devices = [*configured, *devices]
        if len(devices) > len(VIRTIO_GSIS):
            raise ConfigError("devices", len(devices), f"at most {len(VIRTIO_GSIS)} fit")
        pieces, handler = (None, "") if image is None else (image.memory, image.handler)
        huge = config.huge_pages == "2M"
        self.memory = self._owned(GuestMemory(config.memory, huge=huge, pieces=pieces, handler=handler))
        first = layout.VIRTIO_MMIO + config.boot_timer * layout.VIRTIO_MMIO_STRIDE
        windows = [
            (first + i * layout.VIRTIO_MMIO_STRIDE, layout.VIRTIO_MMIO_STRIDE, VIRTIO_GSIS[i])
            for i in range(len(devices))
        ]
        if image is None:
            self._load(windows)
        else:
            self.cmdline = image.cmdline
        usable = prepared is not None and prepared.kvm.path == config.kvm
        if image is not None:
            self.kvm = Kvm.shared(config.kvm)
        else:
            self.kvm = prepared.kvm if prepared is not None and usable else self._owned(Kvm(config.kvm))
            self._check_kvm()
        self.vm = prepared if prepared is not None and usable else self._owned(self.kvm.create_vm())
        # In this order: a memory slot that comes right after the irqchip makes KVM wait twice for its readers.
        self.vm.map_memory(self.memory, log_dirty=config.track_dirty_pages)
        self._map_dax_windows(devices)
        lines = [self._owned(IrqLine(gsi)) for _, _, gsi in windows]
        self.virtio = tuple(self._transport(device, line) for device, line in zip(devices, lines, strict=True))
        if windows and self.kvm.check(abi.KVM_CAP_READONLY_MEM):
            for (base, size, _), transport in zip(windows, self.virtio, strict=True):
                self.vm.map_window(base, size, transport.page_address, read_only=True)
        self.vm.create_irqchip()
        self._add_platform()
        if timer is not None:
            self.mmio.add(layout.VIRTIO_MMIO, layout.VIRTIO_MMIO_STRIDE, timer, "boot timer")
        for window, transport, line in zip(windows, self.virtio, lines, strict=True):
            self._add_virtio(transport, line, *window[:2])
        self.vcpus = tuple(self._owned(Vcpu(self.vm, index, self.pio, self.mmio)) for index in range(config.cpus))
        if image is None:
            self._set_up_vcpus()
        else:
            try:
                self._restore(image)
            except VmmError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                raise SnapshotError("snapshot", f"is damaged: {type(error).__name__}: {error}") from None

    def _load(self, windows: list[tuple[int, int, int]]) -> None:
        config = self.config
        cmdline = Cmdline(config.full_cmdline)
        for window in windows:
            cmdline.append(mptable.virtio_mmio_parameter(*window))
        self.cmdline = str(cmdline)
        self.loaded = load.load(
            self.memory, config.kernel, initrd_path=config.initrd, cmdline=self.cmdline,
            protocol=config.protocol, unpack=config.unpack,
        )  # fmt: skip
        acpi.write(
            self.memory, cpus=config.cpus, virtio=windows, serial=[(SERIAL_PORT, SERIAL_GSI)],
            keyboard=KEYBOARD_GSI if config.keyboard else None, events=EVENTS_GSI,
        )  # fmt: skip
        mptable.write(self.memory, cpus=config.cpus)
        self._new_generation()

    def _check_kvm(self) -> None:
        config = self.config
        template = config.cpu_template
        more, less = (template.capabilities, template.not_required) if template else ((), ())
        if lacking := self.kvm.lacking(more, less):
            raise ConfigError("--kvm", config.kvm, f"lacks {', '.join(lacking)}; use Linux 4.11 or later")
        if config.cpus > self.kvm.max_vcpus():
            raise ConfigError("cpus", config.cpus, f"this KVM allows at most {self.kvm.max_vcpus()}")

    def _virtio_devices(self) -> list[VirtioDevice]:
        # In the order in which the guest finds them. A guest without a device does not pay for importing it.
        config = self.config
        devices: list[VirtioDevice] = []
        if config.drives:
            from virtio._limiter import RateLimiter
            from virtio.blk import Block, Disk

            for place, drive in enumerate(config.drives):
                path, image_format = drive.path_on_host, drive.image_format
                if image_format == "qcow2":
                    _will_start("disk", path, "qemu-storage-daemon")
                    from virtio.qcow2 import Qcow2

                    path = self._owned(
                        Qcow2(
                            path, read_only=drive.is_read_only, backing_file=drive.backing_file,
                            backing_format=drive.backing_format or "raw",
                        )
                    ).raw  # fmt: skip
                    image_format = "raw"
                disk = self._owned(
                    Disk(
                        path, read_only=drive.is_read_only, direct=drive.direct, image_format=image_format,
                        any_size=drive.any_size,
                    )
                )  # fmt: skip
                limits = drive.rate_limiter
                block = Block(
                    disk, serial=drive.drive_id or "", name=f"virtio-blk{place}", queues=drive.queues,
                    engine=drive.io_engine, unsafe=drive.cache_type == "Unsafe",
                    limiter=RateLimiter(limits.bandwidth, limits.ops) if limits else None,
                )  # fmt: skip
                self.blocks[drive.drive_id or f"drive_{place}"] = block
                devices.append(block)
        for place, net in enumerate(config.network_interfaces):
            interface = self.nets[net.iface_id or f"eth{place}"] = self._net(net, place)
            devices.append(interface)
        if config.shares:
            from virtio._limiter import RateLimiter
            from virtio.fs import Fs

            for place, share in enumerate(config.shares):
                limits = share.rate_limiter
                fs = Fs(
                    share.tag, share.shared_dir, read_only=share.read_only, cache=share.cache_policy,
                    threads=share.threads, squash=share.squash, submounts=share.submounts, dax=share.dax,
                    name=f"virtio-fs{place}",
                    limiter=RateLimiter(limits.bandwidth, limits.ops) if limits else None,
                )  # fmt: skip
                self.shares[share.tag] = self._owned(fs)
                devices.append(fs)
        if config.vsock is not None:
            from virtio.vsock import Listener, Vsock

            listener = self._owned(self._listener or Listener(config.vsock.uds_path))
            devices.append(Vsock(listener, config.vsock.guest_cid))
        if config.entropy is not None:
            from virtio._limiter import RateLimiter
            from virtio.rng import Entropy

            limits = config.entropy.rate_limiter
            devices.append(Entropy(limiter=RateLimiter(limits.bandwidth, limits.ops) if limits else None))
        if config.balloon is not None:
            from virtio.balloon import Balloon

            balloon = config.balloon
            if balloon.amount_mib > config.memory >> 20:
                most = config.memory >> 20
                raise ConfigError("balloon amount_mib", balloon.amount_mib, f"must be at most {most}, the memory")
            self.balloon = Balloon(
                balloon.amount_mib, deflate_on_oom=balloon.deflate_on_oom,
                stats_polling_interval_s=balloon.stats_polling_interval_s,
                free_page_reporting=balloon.free_page_reporting,
            )  # fmt: skip
            devices.append(self.balloon)
        if config.virtio_console:
            from virtio.console import Console as VirtioConsole

            hvc = VirtioConsole()
            devices.append(hvc)
            self._hvc = hvc.ports[0]
        for device in devices:
            device.poll_us = config.poll_us
        return devices

    def _map_dax_windows(self, devices: Sequence[VirtioDevice]) -> None:
        # Above RAM, which ends at 4 GiB at least as far as a window is concerned, one after the other.
        gpa = layout.dax_windows(self.config.memory)
        for device in devices:
            if window := getattr(device, "window", None):
                self.vm.map_window(gpa, window.size, window.address)
                device.shm_regions[0] = (gpa, window.size)
                self._windows += (window,)
                gpa += window.size

    def _net(self, config: NetConfig, place: int) -> Net:
        from virtio._limiter import RateLimiter
        from virtio.net import Net, default_mac, parse_mac
        from virtio.net_host import Passt, Tap

        backend: Tap | Passt
        if config.mode == "user":
            _will_start("net", "user", "passt")
            backend = self._owned(Passt(loopback=config.loopback))
        elif config.fd is not None:
            backend = self._owned(Tap.inherited(config.fd))
        else:
            if config.mode == "auto" and threads.no_programs:
                raise ConfigError("net", "auto", "makes a tap, and this process may not; make one before (tap=NAME)")
            backend = self._owned(Tap(config.host_dev_name or "pyvmm%d", config.queues, make=config.mode == "auto"))
            if config.mode == "auto":
                backend.configure(address=config.address, mtu=config.mtu)
                if config.nat and config.address:
                    from virtio.nat import Nat

                    self._owned(Nat(config.address, backend.name))
        limits = config.rx_rate_limiter, config.tx_rate_limiter
        rx, tx = (RateLimiter(limit.bandwidth, limit.ops) if limit else None for limit in limits)
        mac = parse_mac(config.guest_mac) if config.guest_mac else default_mac(f"{backend.name}{place}")
        endpoint = None
        if self.config.mmds is not None and (config.iface_id or f"eth{place}") in self.config.mmds.network_interfaces:
            from socket import inet_aton

            from virtio.mmds_net import Endpoint
            from vmm import preload

            preload.load(preload.METADATA)  # the device's thread may not import
            self.mmds.configure(self.config.mmds)
            endpoint = Endpoint(self.mmds.serve, inet_aton(self.config.mmds.ipv4_address))
        net = Net(
            backend, mac, mtu=config.mtu, pcap=config.pcap, rx_limiter=rx, tx_limiter=tx, mmds=endpoint,
            name=f"virtio-net{place}",
        )  # fmt: skip
        return self._owned(net)

    def _owned(self, thing: _T) -> _T:
        self._closers.append(thing.close)
        return thing

    def _add_platform(self) -> None:
        self.pio = Bus("pio", 1 << 16)
        self.mmio = Bus("mmio", 1 << 52)
        self.serial = self._owned(Serial(self._irq(SERIAL_GSI)))
        port = self.serial if self._hvc is None else self._hvc
        limit = None
        if (limits := self.config.console_rate_limiter) is not None:
            from virtio._limiter import RateLimiter

            limit = RateLimiter(limits.bandwidth, limits.ops).ask
        self.console = self._owned(
            Console(port, mode=self.config.console, on_output=self._on_output, on_quit=self.stop, limit=limit)
        )
        if self._hvc is not None:
            self._owned(Console(self.serial, mode="none")).start()  # its output goes nowhere, and holds nobody up
        self.i8042 = I8042(self._irq(KEYBOARD_GSI).trigger)
        self.pio.add(SERIAL_PORT, 8, self.serial, "serial")
        self.pio.add(0x60, 1, self.i8042.data, "i8042")
        self.pio.add(0x64, 1, self.i8042.command, "i8042")
        self._pit = Pit(self.vm.create_pit)
        self.pio.add(PIT_PORT, PIT_PORTS, self._pit, "timer")
        self.pio.add(SPEAKER_PORT, 1, self._pit.speaker, "speaker")
        self.rtc = Rtc(self.config.memory)
        self.pio.add(0x70, 2, self.rtc, "rtc")
        AcpiPower().attach(self.pio)
        self.events = AcpiEvents(self._irq(EVENTS_GSI).trigger)
        self.pio.add(EVENTS_PORT, 1, self.events, "ACPI events")
        self.pio.add(0x505, 1, PvPanic(), "pvpanic")
        if self.config.exit_port is not None:
            self.pio.add(self.config.exit_port, 4, ExitPort(), "exit port")

    def _irq(self, gsi: int) -> IrqLine:
        line = self._owned(IrqLine(gsi))
        self.vm.irqfd(line.fd, gsi)
        return line

    def _transport(self, device: VirtioDevice, line: IrqLine) -> VirtioMmio:
        from virtio.mmio import VirtioMmio

        return self._owned(VirtioMmio(device, self.memory, line))

    def _add_virtio(self, transport: VirtioMmio, line: IrqLine, base: int, size: int) -> None:
        from virtio import spec

        self.mmio.add(base, size, transport, transport.device.name)
        self.vm.irqfd(line.fd, line.gsi)
        for queue, fd in enumerate(transport.notify_fds):
            self.vm.ioeventfd(fd, base + spec.MMIO_QUEUE_NOTIFY, queue)
        # That a used ring was seen is said at every interrupt, and means nothing to us: KVM takes it. InterruptStatus
        # then goes on saying that rings may have changed; that the configuration was seen comes here.
        self.vm.ioeventfd(transport.ack_fd, base + spec.MMIO_INTERRUPT_ACK, spec.INTERRUPT_USED)

    def _set_up_vcpus(self) -> None:
        entries = self.kvm.supported_cpuid()
        template = self.config.cpu_template
        if template is not None:
            template.change_cpuid(entries)
        count, threads = self.config.cpus, 2 if self.config.smt and self.config.cpus > 1 else 1
        deadline = bool(self.kvm.check(abi.KVM_CAP_TSC_DEADLINE_TIMER))
        for index in range(count):
            vcpu = self.vcpus[index]
            cpu.shape_cpuid(entries, index=index, count=count, threads=threads, tsc_deadline=deadline)
            vcpu.set_cpuid(entries)
            vcpu.set_msrs(cpu.BOOT_MSRS)
            if template is not None and template.msrs:
                old = vcpu.get_msrs(tuple(template.msrs))
                vcpu.set_msrs({index: bits(old[index]) for index, bits in template.msrs.items()})
        first = self.vcpus[0]
        sregs, regs = first.sregs, first.regs
        if self.loaded.protocol == "pvh":
            cpu.enter_pvh(self.memory, sregs, regs, entry=self.loaded.entry, start_info=self.loaded.boot_info)
        else:
            cpu.enter_linux64(self.memory, sregs, regs, entry=self.loaded.entry, zero_page=self.loaded.boot_info)
        first.sregs, first.regs = sregs, regs

    # State

    @property
    def _board(self) -> dict[str, Serial | I8042 | Rtc | AcpiEvents]:
        """What of the board has state, by name."""
        return {"serial": self.serial, "i8042": self.i8042, "rtc": self.rtc, "events": self.events}

    def freeze(self) -> Image:
        """What this machine is now, for others to go on from. It goes on itself, unless it was paused or not started.

        The vCPUs are held meanwhile, and the devices finish what they have. RAM is not copied: it becomes
        copy-on-write, and a later ``freeze`` copies what was written since the one before. Disks are not looked at:
        who lets others go on copies those that they write to, while this machine is paused.

        :raises SnapshotError: a device or RAM cannot be saved, by name; nothing was stopped
        :raises VmmError: it has ended
        """
        return self._freeze(lambda: None)

    def fork(
        self, count: int = 1, *, change: Callable[[VmConfig, int], VmConfig] | None = None, isolated: bool = False
    ) -> list[Any]:
        """Machines that go on from where this one is, started; this one goes on, too.

        :param count: how many
        :param isolated: each in a process of its own (:class:`vmm.isolated.Isolated`), not in this one
        :param change: is given a child's configuration and its number from 0 on, and returns the one it is to have

        Without a change a child has a copy of every disk that the guest writes to, by reflink where the file system
        can, which goes with the child; no console of the host's; its socket device at ``PATH.N``, N counting all
        children of this machine; a passt of its own. A tap is one machine's: give each child another, by `change`.
        :raises SnapshotError: a device or RAM cannot be saved or shared, by name
        :raises VmmError: it has ended
        """
        from vmm.snapshot import fork

        return fork(self, count, change, isolated=isolated)

    def record_touched(self, directory: str) -> None:
        """Have those who load the snapshot in `directory` next get the pages that this machine has touched at once.

        :param directory: of the snapshot that this machine was made of
        :raises HostError: it cannot be written, or this kernel cannot tell (before Linux 6.7)
        """
        from vmm.snapshot_file import TOUCHED, record

        try:
            touched = self.memory.touched()
        except OSError as error:
            raise HostError(error.errno or 0, "tell which pages were touched") from None
        record(touched, self.config.memory, os.path.join(directory, TOUCHED))

    def _freeze(self, while_held: Callable[[], None]) -> Image:
        if self._stop is not None:
            raise VmmError("a machine that has ended cannot be frozen")
        for transport in self.virtio:
            if transport.status and (why := transport.device.unsavable):
                raise SnapshotError(transport.device.name, why)
        if self.memory.huge:
            raise SnapshotError("memory", "in huge pages cannot be shared copy-on-write")
        from vmm.snapshot import Image

        access = self.kvm.state_access()
        self._hold("freeze")
        try:
            for transport in self.virtio:
                transport.stop()
            if self._stop is not None:
                raise VmmError("a machine that has ended cannot be frozen")
            while_held()
            self._pit.make()
            return Image(
                self.config,
                cmdline=self.cmdline,
                vcpus=[access.save_vcpu(vcpu.fd) for vcpu in self.vcpus],
                vm=access.save_vm(self.vm.fd),
                board={name: part.save() for name, part in self._board.items()},
                virtio=[transport.save() for transport in self.virtio],
                memory=self.memory.freeze(),
            )
        finally:
            if self._stop is None:
                for transport in self.virtio:
                    transport.go_on()
            self._release("freeze")

    def _restore(self, image: Image) -> None:
        if len(image.vcpus) != len(self.vcpus):
            raise SnapshotError("vcpus", f"the state has {len(image.vcpus)}, the configuration {len(self.vcpus)}")
        if len(image.virtio) != len(self.virtio):
            raise SnapshotError("devices", f"the state has {len(image.virtio)}, the configuration {len(self.virtio)}")
        access = self.kvm.state_access()
        self._pit.make()
        self._clock = image.vm["clock"]
        # First, so that what vCPUs compute from the clock is right, and again, because their TSCs may move it.
        access.set_clock(self.vm.fd, image.vm["clock"], realtime=True)
        for vcpu, state in zip(self.vcpus, image.vcpus, strict=True):
            access.restore_vcpu(vcpu.fd, state)
        access.restore_vm(self.vm.fd, image.vm, realtime=True)
        for name, part in self._board.items():
            part.restore(image.board[name])
        for transport, saved in zip(self.virtio, image.virtio, strict=True):
            transport.restore(saved)
        # Before its first instruction: the guest's kernel takes new random numbers.
        self._new_generation()
        self.events.tell(GENERATION_CHANGED)

    def _new_generation(self) -> None:
        self.memory.write(layout.VM_GENERATION, os.urandom(16))

    # Running

    def on_exit(self, callback: Callable[[Stop], None]) -> None:
        """Call `callback` once with how the VM ended, on the thread that ended it, before ``wait`` returns."""
        self._exit_callbacks.append(callback)

    def on_console(self, callback: Callable[[bytes], None]) -> None:
        """Call `callback` with the serial port's output as it comes, on the console's thread."""
        self._console_callbacks.append(callback)

    def _on_output(self, data: bytes) -> None:
        for callback in self._console_callbacks:
            callback(data)

    def start(self, *, paused: bool = False) -> None:
        """Let every vCPU run, each on a thread of its own.

        :param paused: it begins as if ``pause`` had been called
        :raises VmmError: it was started or stopped before
        :raises HostError: no thread to be had; the machine has ended, and ``wait`` raises this, too
        """
        if self._started or self._stop is not None:
            raise VmmError("a machine is started once, and not after it was stopped")
        self._started = True
        if paused:
            self._holds.add("pause")
        self.console.start()
        for transport in self.virtio:
            transport.go_on()
        try:
            for vcpu in self.vcpus:
                self._threads.append(threads.spawn("vcpu", f"fc_vcpu {vcpu.index}", self._run_vcpu, vcpu))
        except RuntimeError:
            failure = HostError(errno.EAGAIN, "start a vCPU's thread")
            self._end(Stop(StopReason.REQUESTED), failure)
            raise failure from None

    def _run_vcpu(self, vcpu: Vcpu) -> None:
        try:
            vcpu.loop.attach(f"fc_vcpu {vcpu.index}")
            self._park_while_held()  # it may have been started paused
            while self._run_once(vcpu) and self._stop is None:
                self._park_while_held()
        except Stop as stop:
            self._end(stop)
        except BaseException as failure:  # a device's bug or the host's failure: wait() raises it
            self._end(Stop(StopReason.REQUESTED), failure)
        finally:
            vcpu.loop.detach()

    def _run_once(self, vcpu: Vcpu) -> bool:
        while True:
            seen = [window.repairs for window in self._windows]
            try:
                return vcpu.run()
            except KvmError as error:
                # Somebody truncated a file that the guest has mapped, and it touched what is gone: it gets zeros there.
                # Another vCPU that touched it too may have been first.
                for window in self._windows:
                    window.repair()
                if error.errno != errno.EFAULT or seen == [window.repairs for window in self._windows]:
                    raise

    def _park_while_held(self) -> None:
        with self._change:
            self._parked += 1
            self._change.notify_all()
            self._change.wait_for(lambda: not self._holds or self._stop is not None)
            self._parked -= 1

    def _end(self, stop: Stop, failure: BaseException | None = None) -> None:
        with self._change:
            if self._stop is not None:
                return
            if stop.reason is StopReason.RESET and self.console.panic_seen:
                stop = Stop(StopReason.PANIC)
            self._stop, self._failure = stop, failure
            self._change.notify_all()
            for bell in self._bells:
                bell.ring()
        for vcpu in self.vcpus:
            vcpu.kick()
        logger.info(f"The VM ended: {stop if failure is None else failure}")
        for callback in self._exit_callbacks:
            callback(stop)

    def wait(self, timeout: float | None = None) -> Stop | None:
        """Wait until the VM has ended. In the main thread the handlers of signals run meanwhile, none of them late.

        :param timeout: seconds, or None for as long as it takes
        :returns: how it ended, or None: still running
        :raises Exception: what a device of yours or the host's KVM raised in a vCPU's thread
        """
        if not self._wait_for_stop(timeout):
            return None
        for thread in self._threads:
            thread.join()
        self.console.close()  # its last words are out before anybody hears that it ended
        if self._failure is not None:
            raise self._failure
        return self._stop

    def _wait_for_stop(self, timeout: float | None) -> bool:
        if threading.current_thread() is not threading.main_thread():
            with self._change:
                return self._change.wait_for(lambda: self._stop is not None, timeout)
        with Bell() as bell:
            with self._change:
                self._bells.append(bell)
            try:
                return bell.wait(lambda: self._stop is not None, timeout)
            finally:
                with self._change:
                    self._bells.remove(bell)

    def stop(self) -> None:
        """End the VM as if its power were cut; idempotent, from any thread."""
        self._end(Stop(StopReason.REQUESTED))

    def pause(self) -> None:
        """Hold every vCPU before its next instruction; returns when all are held. Devices finish what they have."""
        if not self._started or self._stop is not None:
            raise VmmError("only a running machine can be paused")
        self._hold("pause")

    def resume(self) -> None:
        """Let the vCPUs go on; harmless on a machine that is not paused."""
        self._release("pause")

    def wake(self) -> None:
        """Let a machine go on that was made of an image and started paused, by the host's clock as it is now."""
        if self._clock:
            self.kvm.state_access().set_clock(self.vm.fd, self._clock, realtime=True)
        self.resume()

    def _hold(self, reason: str) -> None:
        # Until each reason is released. Returns when no vCPU runs, or will.
        with self._change:
            self._holds.add(reason)
            if not self._started:
                return
        for vcpu in self.vcpus:
            vcpu.kick()
        with self._change:
            self._change.wait_for(lambda: self._parked == len(self.vcpus) or self._stop is not None)

    def _release(self, reason: str) -> None:
        with self._change:
            self._holds.discard(reason)
            self._change.notify_all()

    def send_ctrl_alt_del(self) -> None:
        """Press Ctrl-Alt-Del: a guest with a driver for the keyboard reboots, or what else it is set to do.

        :raises VmmError: it is not running, or the guest has not read the keys that were pressed before
        """
        if not self._started or self._stop is not None:
            raise VmmError("only a running machine has a keyboard")
        self.i8042.press_ctrl_alt_del()

    def press_power_button(self) -> None:
        """Ask the guest to end by itself: one that listens to its power button shuts down.

        :raises VmmError: it is not running
        """
        if not self._started or self._stop is not None:
            raise VmmError("only a running machine has a power button")
        self.events.tell(POWER_BUTTON)

    @property
    def state(self) -> str:
        """``Not started``, ``Running``, ``Paused`` or ``Stopped``."""
        if self._stop is not None:
            return "Stopped"
        if not self._started:
            return "Not started"
        return "Paused" if "pause" in self._holds else "Running"

    @property
    def mmds(self) -> Mmds:
        """The metadata service's document: what the guest is told of, if the configuration lets it ask."""
        if self._mmds is None:
            from vmm.mmds import Mmds

            self._mmds = Mmds()
        return self._mmds

    @property
    def stats(self) -> dict[str, dict[str, int]]:
        """Counters by virtio device, its transport's among them; read while it runs, so no two of one moment."""
        return {each.device.name: {**each.device.stats, **each.stats} for each in self.virtio}

    def close(self) -> None:
        """End the VM and give everything back; idempotent."""
        self.closed = True
        if self._started:
            self.stop()
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()
            self._threads.clear()
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _will_start(field: str, value: str, program: str) -> None:
    if threads.no_programs:
        raise ConfigError(field, value, f"needs {program} to be started, {threads.no_programs}")
