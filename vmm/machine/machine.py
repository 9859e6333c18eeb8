# SPDX-License-Identifier: Apache-2.0
"""Build, start, pause and end a machine. Only this file knows all packages.

with Machine(kernel="vmlinux", memory="512M", console="stdio") as vm:
    vm.start()
    print(vm.wait())
"""

from __future__ import annotations

import itertools
import os
import threading

from boot import layout
from boot.board import OWN_GSIS
from devices.acpi_events import POWER_BUTTON
from vmm import logger, threads
from vmm._bus import Bus
from vmm.closing import Closers, Closing
from vmm.config.option import check_type
from vmm.config.vm import VmConfig
from vmm.errors import ConfigError, HostError, VmmError, host_errors
from vmm.exits import Exit
from vmm.irq import IrqLine
from vmm.kvm.vcpu import Vcpu
from vmm.kvm.vm import Kvm, Vm, why_no_linux
from vmm.machine import first_boot
from vmm.machine.attach import Devices
from vmm.machine.board import Board
from vmm.machine.build import Builder, make_limiter, own
from vmm.machine.console import Console
from vmm.machine.run import Run
from vmm.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Unpack

    from virtio.balloon import Balloon
    from virtio.blk.device import Block
    from virtio.console import ConsolePort
    from virtio.device import VirtioDevice
    from virtio.fs.device import ShareDevice
    from virtio.mmio import VirtioMmio
    from virtio.net.device import Net
    from virtio.vsock.device import Listener, Vsock
    from vmm.config.vm import VmSettings
    from vmm.machine.attach import Attached
    from vmm.machine.build import DeviceConfig
    from vmm.machine.snapshot import Image
    from vmm.memory import Runs
    from vmm.mmds.store import Mmds


class Machine(Closing):
    """A virtual machine. The constructor builds it, ``start`` runs it, and ``close`` ends it. A context manager.

    :param config: a ``VmConfig``; or the path of the kernel, with the other parameters of ``VmConfig`` by name
    :param devices: your own virtio devices, which follow the configured ones; you close them
    :param listener: an open listener for the socket device, which the machine owns from here on. None: the
        configuration makes it
    :param metadata: the document of the metadata service, which becomes ``mmds``. None: an empty one
    :param image: a frozen machine, from which this one goes on; with `config` None it also has its configuration
    :param prepared: from ``vmm.kvm.vm.prepare``, used if it is of the configuration's KVM; the machine owns it
    :param seccomp: put system call filters on the machine's threads. Threads that run your code have none: those of
        your devices and ports that exist at ``start``, and those of callbacks. Your own threads have none either. The
        filters are also off if a debugger or profiler watches every thread at ``start``
    :raises ConfigError: the configuration, one of its files or the host's /dev/kvm cannot be used
    :raises HostError: the host failed
    :raises TypeError: an unknown parameter

    ``memory`` (:class:`vmm.memory.GuestMemory`), ``pio`` and ``mmio`` (:class:`vmm.bus.Bus`), ``vcpus``
    (:class:`vmm.kvm.vcpu.Vcpu`), ``loaded`` (:class:`boot.load.Loaded`) and ``cmdline`` are for inspection.
    ``vm.pio.add(port, size, device, name)`` adds a bus device of your own, and ``irq_line`` returns its interrupt line.
    Snapshots leave it out: add it to each copy before ``start``. ``devices`` has the virtio devices;
    ``attach`` adds one, and ``detach`` removes one. These and the document of the metadata service, ``mmds``
    (:class:`vmm.mmds.store.Mmds`), can be changed while the guest runs.
    """

    def __init__(
        self,
        config: VmConfig | str | os.PathLike[str] | None = None,
        /,
        *,
        devices: Sequence[VirtioDevice] = (),
        listener: Listener | None = None,
        metadata: Mmds | None = None,
        image: Image | None = None,
        prepared: Vm | None = None,
        seccomp: bool = True,
        **settings: Unpack[VmSettings],
    ) -> None:
        if image is not None:
            check_type("Machine", "image", "Image", image)
            config = image.config if config is None else config
        if not isinstance(config, VmConfig):
            config = VmConfig.from_settings(config, settings)
        elif settings:
            raise TypeError("Machine takes a VmConfig or its parameters, not both")
        if isinstance(devices, str) or not hasattr(devices, "__iter__"):
            raise TypeError(f"Machine: devices must be a list of virtio devices, not a {type(devices).__name__}")
        self.config = config
        self.vcpus: tuple[Vcpu, ...] = ()
        self._mmds = metadata
        self._builder = Builder(config, lambda: self.mmds, listener)
        first = layout.VIRTIO_MMIO + config.boot_timer * layout.VIRTIO_MMIO_STRIDE
        self._devices = Devices(first, layout.dax_windows(config.memory))
        self._devices_lock = threading.Lock()  # one change of the devices, or one look at all of them, at a time
        self._starting = threading.RLock()  # a start, or a freeze; a signal's handler may close what is being started
        self._hvc: ConsolePort | None = None
        # The devices again below, in their turn: here for a constructor that fails before that.
        self._closers = Closers((self._builder.close, self._devices.close))
        self.seccomp = seccomp
        self._unconfined = False
        self._run = Run(lambda: self._devices.windows, lambda: self.console.panic_seen)
        self._detached = False  # a configured device was
        self._hot: Runs | None = None if image is None else image.hot  # of its copies; made by the first freeze
        self.children = itertools.count()  # of the copies by ``fork`` and pools: numbers for their sockets' names
        self.closed = False
        self._clock = b""  # the image's, of a machine that was made of one
        try:
            with host_errors("make the machine"):
                self._build(devices, image, prepared)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Machine({self.config.kernel!r}, {self.state})"

    # Building: in the order in which a user's mistake is cheapest to find.

    def _build(self, devices: Sequence[VirtioDevice], image: Image | None, prepared: Vm | None) -> None:
        config = self.config
        if prepared is not None:
            self._closers.own(prepared.kvm)
            self._closers.own(prepared)
            if prepared.kvm.path != config.kvm:
                prepared = None
        self.pio = Bus("pio", 1 << 16)
        self.mmio = Bus("mmio", 1 << 52)
        if config.boot_timer:  # its time runs from here on
            from devices.boot_timer import BootTimer

            self.mmio.add(layout.VIRTIO_MMIO, layout.VIRTIO_MMIO_STRIDE, BootTimer(), "boot timer")
        for attached in self._builder.all():
            attached.configured = True
            self._devices.add(self._devices.place(attached))
            if attached.kind == "console":
                self._hvc = attached.device.ports[0]  # type: ignore[attr-defined]  # VirtioDevice is its base
        slots = [] if image is None else image.slots[len(self._devices.by_id) :]
        for device, slot in itertools.zip_longest(devices, slots[: len(devices)]):
            self._devices.add(self._devices.place(own(device), slot))
        pieces, handler = (None, "") if image is None else (image.memory, image.handler)
        hot = None if image is None or handler else image.hot
        huge = config.huge_pages is not None
        self.memory = self._closers.own(GuestMemory(config.memory, huge=huge, pieces=pieces, hot=hot, handler=handler))
        if config.track_dirty_pages:
            self.memory.prepare_marks()
        if image is None:
            virtio = [(each.base, layout.VIRTIO_MMIO_STRIDE, each.gsi) for each in self.devices.values()]
            self.loaded, self.cmdline = first_boot.load_kernel(self.memory, config, virtio)
            self._new_generation()
            self.kvm = self._closers.own(Kvm(config.kvm)) if prepared is None else prepared.kvm
            first_boot.check_kvm(self.kvm, config)
        else:
            self.cmdline = image.cmdline
            self.kvm = Kvm.shared(config.kvm)
        self.vm = self._closers.own(self.kvm.create_vm()) if prepared is None else prepared
        # In this order: a memory slot that comes right after the irqchip makes KVM wait twice for its readers. Where
        # the irqchip is there already, the slot comes as late as can be, when the machine starts.
        self._maps_late = prepared is not None and image is None
        if not self._maps_late:
            self.vm.map_memory(self.memory)
        self._closers.own(self._devices)
        for attached in self.devices.values():
            attached.make(self.memory, self._devices.window_address(attached))
            attached.map(self.vm)
        self.vm.create_irqchip()
        self._add_platform()
        for attached in self.devices.values():
            attached.bind(self.vm, self.mmio)
        self._ranges = self._count_ranges()
        vcpus = (Vcpu(self.vm, index, self.pio, self.mmio) for index in range(config.cpus))
        self.vcpus = self._run.vcpus = tuple(self._closers.own(vcpu) for vcpu in vcpus)
        if image is None:
            first_boot.set_up_vcpus(self.vcpus, self.kvm, config, self.memory, self.loaded)
        else:
            from vmm.machine.snapshot import restore

            restore(self, image)

    def _add_platform(self) -> None:
        self._board = Board(self.vm, self.pio, self.config, self._closers)
        self.serial, self.i8042 = self._board.serial, self._board.i8042
        self.rtc, self.events = self._board.rtc, self._board.events
        port = self.serial if self._hvc is None else self._hvc
        limiter = make_limiter(self.config.console_rate_limiter)
        limit = None if limiter is None else limiter.ask
        self.console = self._closers.own(Console(port, mode=self.config.console, on_quit=self.stop, limit=limit))
        if self._hvc is not None:
            self.serial.drop_output()

    # State

    def freeze(self) -> Image:
        """The present state of this machine, from which others can go on. This machine goes on, too, if it was running.

        Meanwhile the vCPUs are held, and the devices finish their requests. RAM is not copied: it becomes
        copy-on-write, and a later ``freeze`` copies what was written since the previous one. The image does not
        contain disks: copy the writable ones yourself while this machine is paused.

        :raises SnapshotError: a device or RAM, which it names, cannot be saved; nothing was stopped
        :raises HostError: the host has no descriptor or memory left, or failed
        :raises VmmError: the machine has ended, or the caller is a vCPU's or a device's own thread
        """
        return self._freeze(lambda: None)

    def fork(
        self,
        count: int = 1,
        *,
        change: Callable[[VmConfig, int], VmConfig] | None = None,
        devices: Callable[[int], Sequence[VirtioDevice]] | None = None,
        isolated: bool = False,
    ) -> list[Any]:
        """Running copies of this machine. They go on from its present state, and so does this machine.

        :param count: the number of copies
        :param isolated: run each in its own process, as a :class:`vmm.machine.isolated.Isolated`
        :param change: called with a copy's configuration and its number, from 0; returns the configuration to use
        :param devices: called with a copy's number; returns your own devices for it, in the order of this machine's
        :raises SnapshotError: a device or RAM, which it names, cannot be saved or shared
        :raises HostError: the host has no descriptor, thread or room for a disk left, or failed; there are no copies
        :raises VmmError: the machine has ended

        By default, a copy has a copy of every writable disk, by reflink if the file system can, which is deleted with
        it. It has no console on the host, its own passt, and its socket device at ``PATH.N``, where N counts all
        copies of this machine. A tap belongs to one machine: give each copy another by `change`.

        A copy has none of your bus devices. If it needs one, make it by ``Machine(image=vm.freeze())`` and add the
        device before ``start``.
        """
        from vmm.machine.snapshot import child_of

        check_type("Machine.fork", "count", "int", count)
        if count < 0:
            raise ValueError(f"Machine.fork: count must be 0 or more, not {count}")
        make = child_of(self, change, devices, isolated=isolated)
        children: list[Any] = []
        try:
            for number in range(count):
                children.append(make(number))
                children[-1].start()
        except BaseException:
            Closers(child.close for child in children).close()
            raise
        return children

    def record_touched(self, directory: str) -> None:
        """Record the pages that this machine has touched, in order; later loads of the snapshot read them beforehand.

        :param directory: the directory of the snapshot, from which ``Image.load(..., record=True)`` made this machine
        :raises SnapshotError: the image was loaded without ``record``
        :raises HostError: the list cannot be written, or a page could not be read
        """
        from vmm.machine.snapshot_file import TOUCHED, record

        record(self.memory.touched(), os.path.join(directory, TOUCHED))

    def _freeze(self, while_held: Callable[[], None], without_memory: Callable[[Image], None] | None = None) -> Image:
        from vmm.machine.snapshot import freeze

        if self._run.ended is not None or self.closed:
            raise VmmError("a machine that has ended cannot be frozen")
        self._devices.refuse_own_threads()
        with self._locked(), self._starting:
            return freeze(self, while_held, without_memory)

    def _locked(self) -> threading.Lock:
        self._run.refuse_own_threads()  # who has the lock may wait for them
        return self._devices_lock

    def _new_generation(self) -> None:
        self.memory.write(layout.VM_GENERATION, os.urandom(16))

    # Running

    def on_exit(self, callback: Callable[[Exit], object]) -> None:
        """Call `callback` once with the ``Exit`` of the VM, on any thread, before ``wait`` returns."""
        check_type("Machine.on_exit", "callback", "Callable", callback)
        self._run.callbacks.append(callback)

    def on_console(self, callback: Callable[[bytes], None]) -> None:
        """Call `callback` with the serial port's output as it arrives, on the console's thread."""
        check_type("Machine.on_console", "callback", "Callable", callback)
        self.console.listen(callback)

    def start(self, *, paused: bool = False) -> None:
        """Run every vCPU, each on its own thread.

        :param paused: start as if ``pause`` had been called
        :raises VmmError: the machine was started or stopped before
        :raises ConfigError: a bus device of yours is where guest RAM is
        :raises HostError: the host has no thread or descriptor left; the machine has ended, and ``wait`` raises it
        """
        try:
            with self._starting:  # no freeze may be under way: devices would write, and be stopped by it
                self._start(paused)
        except HostError as failure:
            self._run.end(failure=failure)
            raise

    def _start(self, paused: bool) -> None:
        if self._run.started or self._run.ended is not None or self.closed:
            raise VmmError("a machine can be started only once, and not after it was stopped")
        if self._ranges != self._count_ranges():
            self._refuse_ranges_in_ram()
        if paused:
            self._run.hold("pause")
        self._run.started = True
        with host_errors("start the machine's threads"):
            vcpu_kind, console_kind = self._confine()
            self.console.start(console_kind, native=self.serial if self._hvc is None else None)
            for transport in self.virtio:
                transport.go_on()
            if self._maps_late:
                self.vm.map_memory(self.memory)
            self._run.start(vcpu_kind)

    def _refuse_ranges_in_ram(self) -> None:
        for start, size, _, name in self.mmio.claims:
            for ram in self.memory.regions:
                if start < ram.gpa + ram.size and ram.gpa < start + size:
                    where = f"{start:#x}-{start + size - 1:#x}"
                    problem = f"of {name} is in guest RAM, at {ram.gpa:#x}-{ram.gpa + ram.size - 1:#x}"
                    raise ConfigError("mmio range", where, f"{problem}, where no access reaches a device")

    def _confine(self) -> tuple[str | None, str | None]:
        # The kinds of the vCPUs' threads and the console's.
        traced = (threads.guard is None or not threads.guard.alone) and threads.traced()
        if not self.seccomp or traced:
            if traced:
                logger.debug("No system call filters: a debugger or profiler looks into every thread.")
            self._unconfined = True
            for transport in self.virtio:
                transport.device.thread_kind = None
            return None, None
        from vmm.jail import seccomp

        seccomp.guard(alone=False)
        if threads.guard is not None and threads.guard.alone:
            return "vcpu", "console"
        foreign = (
            self._ranges != self._count_ranges()
            or any(transport.device.thread_kind is None for transport in self.virtio)
            or any(vcpu.has_handlers_of_others for vcpu in self.vcpus)
        )
        return None if foreign else "vcpu", None

    def _count_ranges(self) -> int:
        return len(self.pio.claims) + len(self.mmio.claims) - len(self.virtio)

    def wait(self, timeout: float | None = None) -> Exit | None:
        """Wait until the VM has ended. In the main thread, signal handlers run meanwhile without delay.

        :param timeout: seconds; None: no limit
        :returns: how it ended; None: it is still running
        :raises Exception: an exception of your device, or of the host's KVM, in a vCPU's thread
        """
        if not self._run.wait(timeout):
            return None
        self._run.join()
        self.console.close()  # its last words are out before anybody hears that it ended
        if self._run.failure is not None:
            raise self._run.failure
        ended = self._run.ended
        # Not where it ended: a vCPU's thread asks for no file.
        if ended is not None and "cannot emulate" in ended.detail and (why := why_no_linux()):
            return Exit(ended.reason, ended.code, f"{ended.detail}; {self.config.kvm} {why}")
        return ended

    async def run(self) -> Exit:
        """``start`` and ``wait`` for asyncio, without blocking the event loop. Cancelling the task stops the VM.

        :returns: how it ended
        :raises Exception: an exception of ``start`` or ``wait``
        """
        import asyncio

        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self.on_exit(lambda stop: loop.call_soon_threadsafe(ended.set))
        if not self._run.started:
            self.start()
        try:
            if self._run.ended is None:  # else it ended before `on_exit`
                await ended.wait()
        finally:
            self.stop()
            stop = self.wait()
        assert stop is not None  # wait() without a time limit
        return stop

    def stop(self) -> None:
        """End the VM as if its power were cut; idempotent, from any thread."""
        self._run.end()

    def pause(self) -> None:
        """Hold every vCPU before its next instruction; returns when all are held. Devices finish their requests.

        :raises VmmError: the machine is not running, or the caller is a vCPU's own thread
        """
        if not self._run.running:
            raise VmmError("only a running machine can be paused")
        self._run.hold("pause")

    def resume(self) -> None:
        """Let the vCPUs go on. Does nothing if the machine is not paused."""
        self._run.release("pause")

    def wake(self) -> None:
        """Let a machine go on that was made of an image and started paused. Its clock is set to the host's."""
        if self._clock:
            self.kvm.state_access().set_clock(self.vm.fd, self._clock)
        self.resume()

    def send_ctrl_alt_del(self) -> None:
        """Press Ctrl-Alt-Del. A guest with a driver for the keyboard reboots, unless it has another setting.

        :raises VmmError: the machine is not running, or the guest has not read the previous keys
        """
        if not self._run.running:
            raise VmmError("the keyboard needs a running machine")
        self.i8042.press_ctrl_alt_del()

    def press_power_button(self) -> None:
        """Press the ACPI power button. A guest that listens to it shuts down.

        :raises VmmError: the machine is not running
        """
        if not self._run.running:
            raise VmmError("the power button needs a running machine")
        self.events.tell(POWER_BUTTON)

    @property
    def state(self) -> str:
        """``Not started``, ``Running``, ``Paused`` or ``Stopped``."""
        return self._run.state

    # Devices

    @property
    def devices(self) -> dict[str, Attached]:
        """The present virtio devices by id: ``drive_id``, ``iface_id``, ``tag``, or the device's name."""
        return dict(self._devices.by_id)

    @property
    def virtio(self) -> tuple[VirtioMmio, ...]:
        """The transports of the virtio devices, in the order in which the devices were added."""
        return tuple(each.transport for each in self._devices.by_id.values())

    @property
    def blocks(self) -> dict[str, Block]:
        """The disks by ``drive_id``."""
        return self._devices.named("drive")

    @property
    def nets(self) -> dict[str, Net]:
        """The network interfaces by ``iface_id``."""
        return self._devices.named("net")

    @property
    def shares(self) -> dict[str, ShareDevice]:
        """The shared directories by ``tag``."""
        return self._devices.named("share")

    @property
    def vsock(self) -> Vsock | None:
        """The socket device, or None."""
        return next(iter(self._devices.named("vsock").values()), None)

    @property
    def balloon(self) -> Balloon | None:
        """The balloon, or None."""
        return next(iter(self._devices.named("balloon").values()), None)

    def attach(self, device: VirtioDevice | DeviceConfig) -> Attached:
        """Add a virtio device, at any time before the machine ends. If this fails, nothing has changed.

        :param device: a device of your own; or a configuration, such as ``DriveConfig("data.img")``, from which the
            machine makes a device that it owns
        :returns: its ``id`` for ``detach``, and its guest address ``base`` and interrupt line ``gsi``. Your own devices
            may share a name: the ``id`` of the second is ``NAME.N``, where N is its position
        :raises ConfigError: no position is free, a device of that kind has its name (``id`` or ``tag``), a file that
            it names cannot be used, or your device is in a machine already
        :raises HostError: the host failed
        :raises VmmError: the machine has ended, or the caller is a vCPU's own thread

        The vCPUs are held for a moment. The guest is not told, because its tables and command line are those of the
        start: point its driver to the device.

        ``freeze`` and ``fork`` refuse a machine with a device that was attached from a configuration, until that device
        is detached. They also refuse a machine from which a device of its own configuration was detached. Devices of
        your own may come and go.

        The machine ends the device's threads when it is detached. Files and the like that your device has opened are
        yours to close. You may attach it again.

        A vCPU's thread calls ``write_config``, ``activate``, ``release`` and ``reset`` of your device. If that thread
        has a system call filter, as in a machine that started without devices of your own, a call that the filter
        forbids ends the program. Opening a file is one: open it before you attach the device.
        """
        from virtio.device import VirtioDevice

        with self._locked():
            made = own(device) if isinstance(device, VirtioDevice) else self._builder.make(device)
            attached = self._devices.place(made)
            try:
                with host_errors(f"attach {attached.name}"):
                    self._change_devices(lambda: self._connect(attached))
            except BaseException:
                attached.close()
                raise
        return attached

    def irq_line(self, gsi: int) -> IrqLine:
        """An interrupt line for a bus device of your own: ``trigger()`` raises one edge, from any thread.

        :param gsi: 3 or 8; devices may share a line
        :returns: the line, which ``close`` closes
        :raises ConfigError: the line is not for you
        :raises HostError: the host failed
        """
        if gsi not in OWN_GSIS:
            allowed = " or ".join(map(str, OWN_GSIS))
            raise ConfigError("gsi", gsi, f"is not free for a device of your own; use {allowed}")
        with host_errors("make an interrupt line"):
            line = self._closers.own(IrqLine(gsi))
        self.vm.irqfd(line.fd, gsi)
        return line

    def _connect(self, attached: Attached) -> None:
        if self._unconfined:
            attached.device.thread_kind = None
        attached.connect(self.memory, self._devices.window_address(attached), self.vm, self.mmio)
        self._devices.add(attached)

    def detach(self, id: str) -> None:
        """Remove a device. Its requests are finished, and then its resources are freed.

        Stop the guest's driver first. A guest that still uses the device reads all ones.

        :param id: a key of ``devices``
        :raises VmmError: no device has this id, it is the machine's console, the machine has ended, or the caller is a
            vCPU's own thread or the device's
        """
        if (attached := self._devices.by_id.get(id)) is not None:
            attached.refuse_own_threads()  # before the lock: who has it may wait for them
        with self._locked():
            attached = self._devices.by_id.get(id)
            if attached is None:
                raise VmmError(f"device {id} does not exist; devices: {', '.join(self._devices.by_id) or 'none'}")
            if attached.kind == "console":
                raise VmmError(f"device {id} is the machine's console, which cannot be detached")
            self._change_devices(attached.detach)
            self._devices.remove(attached)
            self._detached = self._detached or attached.configured

    def _change_devices(self, change: Callable[[], None]) -> None:
        # With no vCPU in a device or on its way there.
        def do() -> None:
            if self._run.ended is not None or self.closed:
                raise VmmError("the devices of a machine that has ended stay as they are")
            try:
                change()
            finally:
                self.mmio.reclaim()

        self._run.while_held("devices", do)

    @property
    def mmds(self) -> Mmds:
        """The document of the metadata service, which the guest can read if the configuration has an ``MmdsConfig``."""
        if self._mmds is None:
            from vmm.mmds.store import Mmds

            self._mmds = Mmds()
        return self._mmds

    @property
    def stats(self) -> dict[str, dict[str, int]]:
        """Counters of each virtio device and its transport. They are read one by one while the device runs."""
        return {each.device.name: {**each.device.stats, **each.stats} for each in self.virtio}

    def close(self) -> None:
        """End the VM and free its resources; idempotent. A device's own thread may only ``stop`` it."""
        self._devices.refuse_own_threads()
        self.closed = True
        with self._starting:
            pass  # a start of another thread is over, and none comes any more
        if self._run.started:
            self.stop()
            self._run.join()
        with self._devices_lock:
            self._closers.close()
