# SPDX-License-Identifier: Apache-2.0
"""A machine as it was at one moment: what ``Machine.freeze`` returns, and a new machine is made of."""

from __future__ import annotations

import os

from devices.acpi_events import GENERATION_CHANGED
from vmm.closing import Closers
from vmm.config.devices import DriveConfig, RateLimiterConfig
from vmm.errors import SnapshotError, VmmError, host_errors
from vmm.machine.machine import Machine
from vmm.machine.private_disk import private_copy
from vmm.memory import MemoryFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    from virtio._limiter import RateLimiter
    from virtio.device import VirtioDevice
    from vmm.config.option import Config
    from vmm.config.vm import VmConfig
    from vmm.machine.attach import Attached
    from vmm.machine.isolated import Isolated
    from vmm.memory import Piece, Runs

    _C = TypeVar("_C", bound=Config)


class Image:
    """A frozen machine. Neither the original machine nor its copies change it.

    :ivar config: the machine's configuration. Its paths, taps and sockets belong to the host; a copy may have others
    :ivar cmdline: the guest's command line
    :ivar vcpus: the state of each vCPU (:meth:`vmm.kvm._state.StateAccess.save_vcpu`)
    :ivar vm: the state of interrupt controllers, timer and clock
    :ivar board: the state of the serial port, the keyboard controller and the clock, by name
    :ivar virtio: the state of each virtio device with its transport, in the guest's order
    :ivar memory: guest RAM (:class:`vmm.memory.Piece`)
    :ivar api: what the API has kept with it, or nothing
    :ivar handler: what brings it to machines, in place of ``memory``: the socket of a page fault handler, or a file
        from which a thread of ours does; ``""``: none
    :ivar hot: what its machines write to as soon as they run, (guest address, bytes); None: not learnt
    """

    __slots__ = ("api", "board", "cmdline", "config", "handler", "hot", "memory", "vcpus", "virtio", "vm")

    def __init__(
        self,
        config: VmConfig,
        *,
        cmdline: str,
        vcpus: list[dict[str, Any]],
        vm: dict[str, Any],
        board: dict[str, dict[str, Any]],
        virtio: list[dict[str, Any]],
        memory: list[Piece],
        api: bytes = b"",
    ) -> None:
        self.config = config
        self.cmdline = cmdline
        self.vcpus = vcpus
        self.vm = vm
        self.board = board
        self.virtio = virtio
        self.memory = memory
        self.api = api
        self.handler: str | MemoryFile = ""
        self.hot: Runs | None = None

    @property
    def slots(self) -> list[Any]:
        """The position of each virtio device that is of the embedding program's own; None: it is by its order."""
        return [state.get("slot") if isinstance(state, dict) else None for state in self.virtio]

    def save(self, directory: str) -> None:
        """Write the image to `directory`, completely or not at all; see :mod:`vmm.machine.snapshot_file`.

        :raises ConfigError: the directory exists and is not a snapshot
        :raises HostError: the image cannot be written; a previous one is unchanged
        """
        from vmm.machine.snapshot_file import save

        save(self, directory)

    @staticmethod
    def load(directory: str, *, record: bool = False) -> Image:
        """Load the image in `directory`. Do not change its files while the image or a machine made of it exists.

        :param record: have machines note the pages that they touch, in order, for :meth:`Machine.record_touched`. They
            are slower: a thread brings each of these pages
        :raises HostError: the files cannot be read
        :raises SnapshotError: this is not an image, or it is damaged or has another format
        """
        from vmm.machine.snapshot_file import load

        return load(directory, record=record)


def _saved(attached: Attached) -> dict[str, Any]:
    state = attached.transport.save()
    if not attached.kind:
        state["slot"] = attached.slot  # others may have come and gone
        # A device of the embedding program's own may change later what it has returned: copied, as through a file.
        import msgspec

        try:
            state["device"] = msgspec.msgpack.decode(msgspec.msgpack.encode(state["device"]))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise SnapshotError(attached.id, f"its save() returned what a snapshot cannot hold: {error}") from None
    return state


def _present(machine: Machine) -> VmConfig:
    # Its configuration, with what was changed since it was made: files of disks, limits, the balloon.
    config = machine.config
    drives, nets, shares, balloon = list(config.drives), list(config.nets), list(config.shares), config.balloon
    for index, block in enumerate(machine.blocks.values()):
        if block.replaced:
            drives[index] = _raw(drives[index], block.disk.path)
        drives[index] = _limited(drives[index], rate_limiter=block.limiter)
    for index, net in enumerate(machine.nets.values()):
        nets[index] = _limited(nets[index], rx_rate_limiter=net.rx_limiter, tx_rate_limiter=net.tx_limiter)
    for index, share in enumerate(machine.shares.values()):
        shares[index] = _limited(shares[index], rate_limiter=share.limiter)
    if balloon is not None and (device := machine.balloon) is not None:
        interval = device.stats_polling_interval_s
        balloon = balloon.replaced(amount_mib=device.amount_mib, stats_interval_s=interval)
    present = {"drives": tuple(drives), "nets": tuple(nets), "shares": tuple(shares), "balloon": balloon}
    changes = {name: value for name, value in present.items() if value != getattr(config, name)}
    return config.replaced(**changes) if changes else config


def _raw(drive: DriveConfig, path: str) -> DriveConfig:
    # The same drive with another file, which is raw whatever the one before was.
    return drive.replaced(path=path, format="raw", backing=None, backing_format=None)


def _limited(config: _C, **limiters: RateLimiter) -> _C:
    # The configuration of a device with the limits that it has by now.
    for name, limiter in limiters.items():
        before = getattr(config, name)
        if limiter.buckets != ((before.bandwidth, before.ops) if before else (None, None)):
            config = config.replaced(**{name: RateLimiterConfig(*limiter.buckets)})
    return config


def _refuse_unsavable(machine: Machine) -> None:
    for transport in machine.virtio:
        if transport.status and (why := transport.device.unsavable):
            raise SnapshotError(transport.device.name, why)


def freeze(
    machine: Machine, while_held: Callable[[], None], without_memory: Callable[[Image], None] | None = None
) -> Image:
    """See :meth:`vmm.machine.machine.Machine.freeze`; its devices stay as they are meanwhile.

    :param while_held: called while the vCPUs and the devices do nothing
    :param without_memory: called with the image while RAM still stands still; the image has no memory then
    """
    if machine._detached:
        raise SnapshotError("devices", "a configured device was detached")
    for attached in machine._devices.by_id.values():
        if attached.kind and not attached.configured:
            raise SnapshotError(attached.id, "was attached later, so the configuration lacks it")
    _refuse_unsavable(machine)
    if machine.memory.huge:
        raise SnapshotError("memory", "in huge pages cannot be shared copy-on-write")
    access = machine.kvm.state_access()

    def held() -> Image:
        serving = [transport for transport in machine.virtio if transport.serving]  # none of one that was not started
        try:
            _refuse_unsavable(machine)  # the guest may have begun to use a device meanwhile
            for transport in machine.virtio:
                transport.stop()
            if machine._run.ended is not None:
                raise VmmError("a machine that has ended cannot be frozen")
            while_held()
            # Before the vCPUs: an interrupt of KVM's timer that comes meanwhile comes twice in a copy, and is not lost.
            vm = access.save_vm(machine.vm.fd, timer=machine._board.pit.save())
            vcpus = [access.save_vcpu(vcpu.fd) for vcpu in machine.vcpus]
            vm["clock"] = access.get_clock(machine.vm.fd)
            image = Image(
                _present(machine), cmdline=machine.cmdline, vcpus=vcpus, vm=vm, board=machine._board.save(),
                virtio=[_saved(each) for each in machine.devices.values()], memory=[],
            )  # fmt: skip
            machine._hot = image.hot = [] if machine._hot is None else machine._hot
            if without_memory is None:
                with host_errors("freeze guest memory"):
                    image.memory = machine.memory.freeze()
            else:
                without_memory(image)
            return image
        finally:
            # The handler of a signal may raise anywhere, as KeyboardInterrupt, also where a call begins: then once
            # more. Also where the guest has ended: what it sent last is still to be served.
            try:
                Closers(transport.go_on for transport in serving).close()
            except BaseException:
                Closers(step for transport in serving for step in (transport.go_on, transport.stop)).close()
                raise

    return machine._run.while_held("freeze", held)


def restore(machine: Machine, image: Image) -> None:
    """Make a machine that was built, and has not run, what the one in `image` was.

    :raises SnapshotError: the image is damaged, or of another configuration
    """
    if len(image.vcpus) != len(machine.vcpus):
        raise SnapshotError("vcpus", f"the state has {len(image.vcpus)}, the configuration {len(machine.vcpus)}")
    if len(image.virtio) != len(machine.virtio):
        raise SnapshotError("devices", f"the state has {len(image.virtio)}, the configuration {len(machine.virtio)}")
    try:
        access = machine.kvm.state_access()
        if image.vm["pit2"]:
            machine._board.pit.make()
        machine._clock = image.vm["clock"]
        # First, so that what vCPUs compute from the clock is right, and again, because their TSCs may move it.
        access.set_clock(machine.vm.fd, machine._clock)
        for vcpu, state in zip(machine.vcpus, image.vcpus, strict=True):
            access.restore_vcpu(vcpu.fd, state)
        access.restore_vm(machine.vm.fd, image.vm)
        access.set_clock(machine.vm.fd, machine._clock)
        machine._board.restore(image.board)
        for transport, saved in zip(machine.virtio, image.virtio, strict=True):
            transport.restore(saved)
    except VmmError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SnapshotError("snapshot", f"is damaged: {type(error).__name__}: {error}") from None
    # Before its first instruction: the guest's kernel takes new random numbers.
    machine._new_generation()
    machine.events.tell(GENERATION_CHANGED)


def child_of(
    source: Machine | Image,
    change: Callable[[VmConfig, int], VmConfig] | None = None,
    devices: Callable[[int], Sequence[VirtioDevice]] | None = None,
    *,
    isolated: bool = False,
) -> Callable[[int], Machine | Isolated]:
    """Freeze `source`, if it is a machine; what is returned makes a copy of it, not started, by its number.

    :param isolated: a copy in a process of its own
    :raises SnapshotError: `source` has something that cannot be frozen or shared; the message names it
    :raises ValueError: devices of your own for a process of its own
    """
    if isolated and devices is not None:
        raise ValueError("a copy in a process of its own cannot have devices of this program")
    disks: dict[int, MemoryFile] = {}
    if isinstance(source, Image):
        image = source
        image.hot = [] if image.hot is None else image.hot
        _refuse_taps(image.config, change)
        for index, drive in enumerate(image.config.drives):
            if not drive.read_only:
                if drive.format == "qcow2":
                    raise SnapshotError(drive.path, "is a qcow2 image: only a running machine shows what is in it")
                with host_errors("open the disk", drive.path):
                    fd = os.open(drive.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                disks[index] = MemoryFile(fd, at_once=True)
    else:
        names = ", ".join(each.device.name for each in source.devices.values() if not each.kind)
        if names and devices is None:
            raise SnapshotError(names, "is a device of your program: give each copy its own by devices=")
        _refuse_taps(source.config, change)

        def copy_disks() -> None:
            for index, (drive, block) in enumerate(zip(source.config.drives, source.blocks.values(), strict=True)):
                if not drive.read_only:
                    with block.disk.changing:  # or half of the copy is another file's
                        disks[index] = MemoryFile(private_copy(block.disk.fd, block.disk.path), at_once=True)

        image = source._freeze(copy_disks)

    def make(number: int) -> Machine | Isolated:
        of_all = next(source.children) if isinstance(source, Machine) else number
        own: dict[int, int] = {}
        try:
            for index, file in disks.items():
                own[index] = private_copy(file.fd, image.config.drives[index].path)
            config = _child_config(image.config, own, of_all)
            config = config if change is None else change(config, number)
            if isolated:
                with host_errors("make a process for the copy"):
                    from vmm.machine.isolated import Isolated

                    return Isolated(config, image, own.values())
            own_devices = () if devices is None else devices(number)
            seccomp = isinstance(source, Image) or source.seccomp
            machine = Machine(config, image=image, devices=own_devices, seccomp=seccomp)
            for index, block in enumerate(machine.blocks.values()):
                if index in own and config.drives[index].path == f"/proc/self/fd/{own[index]}":
                    # Its number will be another file's. The kernel's name for a file without one is nobody's.
                    block.disk.path, block.replaced = os.readlink(config.drives[index].path), True
            return machine
        finally:
            for fd in own.values():
                os.close(fd)

    return make


def _refuse_taps(config: VmConfig, change: Callable[[VmConfig, int], VmConfig] | None) -> None:
    for net in config.nets if change is None else ():
        if net.mode != "user":
            raise SnapshotError(
                net.id or "network interface", "a tap belongs to one machine: give each copy another by change="
            )


def _child_config(config: VmConfig, disks: dict[int, int], number: int) -> VmConfig:
    drives = list(config.drives)
    for index, fd in disks.items():
        # The child opens it by this name while it is made, and is then the only one that has it.
        drives[index] = _raw(drives[index], f"/proc/self/fd/{fd}")
    vsock = config.vsock
    if vsock is not None:
        vsock = vsock.replaced(path=f"{vsock.path}.{number}")
    nets = [net.replaced(pcap=None) if net.pcap else net for net in config.nets]  # the file is the parent's
    return config.replaced(drives=drives, nets=nets, vsock=vsock, console="none")
