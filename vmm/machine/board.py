# SPDX-License-Identifier: Apache-2.0
"""Make the devices of the board at the addresses of ``boot.board``."""

from __future__ import annotations

from boot.board import BY_NAME, PARTS
from devices._serial import Serial
from devices.acpi_events import AcpiEvents
from devices.exit_port import ExitPort
from devices.i8042 import I8042
from devices.pit import Pit
from devices.power import AcpiPower
from devices.pvpanic import PvPanic
from devices.rtc import Rtc
from vmm.irq import IrqLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm._bus import Bus
    from vmm.bus import BusDevice
    from vmm.closing import Closers
    from vmm.config.vm import VmConfig
    from vmm.kvm.vm import Vm


class Board:
    """Serial port, keyboard controller, clock, timer, power, event and exit ports of one VM.

    :param vm: the VM, which has its interrupt controllers
    :param pio: the ports
    :param config: has the size of RAM, for the clock, and the exit port
    :param closers: gets what gives the interrupt lines back
    """

    def __init__(self, vm: Vm, pio: Bus, config: VmConfig, closers: Closers) -> None:
        self._vm = vm
        self._closers = closers
        self.serial = closers.own(Serial(self._irq("serial")))
        self.i8042 = I8042(self._irq("i8042").trigger)
        self.rtc = Rtc(config.memory)
        self.events = AcpiEvents(self._irq("events").trigger)
        self.pit = Pit(vm.create_pit)
        behind: dict[str, tuple[BusDevice, ...]] = {
            "serial": (self.serial,),
            "i8042": (self.i8042.data, self.i8042.command),
            "rtc": (self.rtc,),
            "pvpanic": (PvPanic(),),
            "events": (self.events,),
            "power": (AcpiPower(),),
            "timer": (self.pit, self.pit.speaker),
        }
        for part in PARTS:
            for (port, count), device in zip(part.ports, behind[part.name], strict=True):
                pio.add(port, count, device, part.title)
        if config.exit_port is not None:
            pio.add(config.exit_port, 4, ExitPort(), "exit port")

    def _irq(self, name: str) -> IrqLine:
        gsi = BY_NAME[name].gsi
        assert gsi is not None
        line = self._closers.own(IrqLine(gsi))
        self._vm.irqfd(line.fd, gsi)
        return line

    def save(self) -> dict[str, dict[str, Any]]:
        """The state of each part that has one, by name."""
        return {part.name: getattr(self, part.name).save() for part in PARTS if part.state}

    def restore(self, state: dict[str, dict[str, Any]]) -> None:
        """Take what ``save`` told of another board."""
        for part in PARTS:
            if part.state:
                getattr(self, part.name).restore(state[part.name])
