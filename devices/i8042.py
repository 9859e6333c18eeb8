# SPDX-License-Identifier: Apache-2.0
"""The PC's keyboard controller with nothing plugged in: kernels probe it, and pulse its output port to reset.

Each command that a driver waits for is answered at once: an unanswered one costs Linux half a second.
Source: Intel 8042 as in the IBM PS/2 Technical Reference (Keyboard and Auxiliary Device Controller);
Linux drivers/input/serio/i8042.c and i8042.h.
"""

from __future__ import annotations

from vmm.events import Stop, StopReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

STATUS_OUTPUT_FULL = 0x01
STATUS_SYSTEM = 0x04  # the self test passed
STATUS_COMMAND = 0x08  # the last write was a command
STATUS_UNLOCKED = 0x10

CTR_SYSTEM = 0x04
CTR_KEYBOARD_DISABLED = 0x10
CTR_AUX_DISABLED = 0x20
CTR_TRANSLATE = 0x40

READ_RAM, WRITE_RAM = 0x20, 0x60  # and the 31 after each; byte 0 is the command register, CTR
DISABLE_AUX, ENABLE_AUX, TEST_AUX = 0xA7, 0xA8, 0xA9
SELF_TEST = 0xAA
TEST_KEYBOARD, DISABLE_KEYBOARD, ENABLE_KEYBOARD = 0xAB, 0xAD, 0xAE
READ_INPUT_PORT = 0xC0
READ_OUTPUT_PORT, WRITE_OUTPUT_PORT = 0xD0, 0xD1
LOOP_KEYBOARD, LOOP_AUX, WRITE_AUX = 0xD2, 0xD3, 0xD4
PULSE_OUTPUT_PORT = 0xF0  # and the 15 after it: a clear bit pulls that line of the output port low

OUTPUT_NOT_RESET = 0x01  # the CPU runs while this line is high
OUTPUT_A20 = 0x02
SELF_TEST_PASSED = 0x55
LINE_OK = 0x00
CLOCK_STUCK_LOW = 0x01  # what an interface test answers for a line with no device

# Commands whose parameter comes by the data port.
_WITH_PARAMETER = frozenset({WRITE_OUTPUT_PORT, LOOP_KEYBOARD, LOOP_AUX, WRITE_AUX})


class I8042:
    """The controller; ``data`` is the bus device for port 0x60 and ``command`` the one for 0x64."""

    __slots__ = ("_last_was_command", "_output", "_pending", "_ram", "command", "data")

    def __init__(self) -> None:
        self._ram = bytearray(32)
        self._ram[0] = CTR_TRANSLATE | CTR_AUX_DISABLED | CTR_KEYBOARD_DISABLED | CTR_SYSTEM
        self._output: int | None = None
        self._pending: int | None = None
        self._last_was_command = False
        self.data = _Port(self._read_data, self._write_data)
        self.command = _Port(self._read_status, self._write_command)

    def _read_data(self) -> int:
        value, self._output = self._output, None
        return value or 0

    def _read_status(self) -> int:
        status = STATUS_UNLOCKED | (self._ram[0] & CTR_SYSTEM)
        if self._output is not None:
            status |= STATUS_OUTPUT_FULL
        if self._last_was_command:
            status |= STATUS_COMMAND
        return status

    def _write_command(self, command: int) -> None:
        self._last_was_command = True
        self._pending = None
        ram = self._ram
        if READ_RAM <= command < READ_RAM + len(ram):
            self._output = ram[command - READ_RAM]
        elif WRITE_RAM <= command < WRITE_RAM + len(ram) or command in _WITH_PARAMETER:
            self._pending = command
        elif command == SELF_TEST:
            ram[0] |= CTR_SYSTEM
            self._output = SELF_TEST_PASSED
        elif command == TEST_KEYBOARD:
            self._output = LINE_OK  # an error here makes Linux warn; an absent keyboard is silent
        elif command == TEST_AUX:
            self._output = CLOCK_STUCK_LOW
        elif command == DISABLE_AUX:
            ram[0] |= CTR_AUX_DISABLED
        elif command == ENABLE_AUX:
            ram[0] &= 0xFF ^ CTR_AUX_DISABLED
        elif command == DISABLE_KEYBOARD:
            ram[0] |= CTR_KEYBOARD_DISABLED
        elif command == ENABLE_KEYBOARD:
            ram[0] &= 0xFF ^ CTR_KEYBOARD_DISABLED
        elif command == READ_INPUT_PORT:
            self._output = 0
        elif command == READ_OUTPUT_PORT:
            self._output = OUTPUT_NOT_RESET | OUTPUT_A20
        elif command >= PULSE_OUTPUT_PORT and not command & OUTPUT_NOT_RESET:
            raise Stop(StopReason.RESET)

    def _write_data(self, value: int) -> None:
        self._last_was_command = False
        command, self._pending = self._pending, None
        if command is None or command == WRITE_AUX:
            return  # for a keyboard or a mouse, and none is there to answer
        if command == WRITE_OUTPUT_PORT:
            if not value & OUTPUT_NOT_RESET:
                raise Stop(StopReason.RESET)
        elif command in (LOOP_KEYBOARD, LOOP_AUX):
            # Also for the auxiliary loop without the status bit that says so: the driver sees at once that
            # there is no such port, and does not wait for an answer.
            self._output = value
        else:
            self._ram[command - WRITE_RAM] = value


class _Port:
    """One of the two ports as a bus device: a byte wide, whatever width the guest uses."""

    __slots__ = ("_get", "_put")

    def __init__(self, get: Callable[[], int], put: Callable[[int], None]) -> None:
        self._get = get
        self._put = put

    def read(self, offset: int, data: memoryview) -> None:
        data[:] = b"\xff" * len(data)
        if offset == 0:
            data[0] = self._get()

    def write(self, offset: int, data: memoryview) -> None:
        if offset == 0:
            self._put(data[0])
