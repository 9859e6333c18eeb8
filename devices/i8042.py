# SPDX-License-Identifier: Apache-2.0
"""The PC's keyboard controller and keyboard: kernels probe them, reset by them, and get Ctrl-Alt-Del.

Each command that a driver waits for is answered at once, because an unanswered one costs Linux half a second. The
keyboard has the keys that ``press_ctrl_alt_del`` needs. There is no mouse.
Source: Intel 8042 as in the IBM PS/2 Technical Reference (Keyboard and Auxiliary Device Controller; Keyboards, for the
commands and scan codes); Linux drivers/input/serio/i8042.c and i8042.h, drivers/input/keyboard/atkbd.c.
"""

from __future__ import annotations

import threading

from vmm.errors import VmmError
from vmm.exits import Stop, StopReason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STATUS_OUTPUT_FULL = 0x01
STATUS_COMMAND = 0x08  # the last write was a command
STATUS_UNLOCKED = 0x10

CTR_KEYBOARD_INTERRUPT = 0x01
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

# Commands that are questions, with the answers; and those that stop a line or let it go on, with its bit of CTR.
_ANSWERS = {
    TEST_KEYBOARD: LINE_OK, TEST_AUX: CLOCK_STUCK_LOW, READ_INPUT_PORT: 0,
    READ_OUTPUT_PORT: OUTPUT_NOT_RESET | OUTPUT_A20,
}  # fmt: skip
_DISABLE = {DISABLE_AUX: CTR_AUX_DISABLED, DISABLE_KEYBOARD: CTR_KEYBOARD_DISABLED}
_ENABLE = {ENABLE_AUX: CTR_AUX_DISABLED, ENABLE_KEYBOARD: CTR_KEYBOARD_DISABLED}
# Commands whose parameter comes by the data port.
_WITH_PARAMETER = frozenset({WRITE_OUTPUT_PORT, LOOP_KEYBOARD, LOOP_AUX, WRITE_AUX})

# The keyboard: what it is told, and what it answers.
KEYBOARD_SET_LEDS, KEYBOARD_SCAN_CODES, KEYBOARD_SET_RATE = 0xED, 0xF0, 0xF3  # a parameter follows
KEYBOARD_ECHO, KEYBOARD_ID, KEYBOARD_RESET = 0xEE, 0xF2, 0xFF
KEYBOARD_ACK, KEYBOARD_WHAT, KEYBOARD_PASSED = b"\xfa", b"\xfe", b"\xaa"
KEYBOARD_BUFFER = 16  # bytes, as in the real one
SCAN_CODE_SET, SCAN_CODE_SET_TRANSLATED = b"\2", b"\x41"
# Three keys down, and up: in set 2, and as the controller turns that into set 1.
CTRL_ALT_DEL = bytes.fromhex("14 11 e071"), bytes.fromhex("e0f071 f011 f014")
CTRL_ALT_DEL_TRANSLATED = bytes.fromhex("1d 38 e053"), bytes.fromhex("e0d3 b8 9d")
# What of the two a driver could tell, by attribute.
_STATE = (
    "ram", "output", "of_keyboard", "keys", "release", "keyboard_command", "pending", "last_was_command",
)  # fmt: skip
_TRANSLATED_ID = b"\xab\x41"
_ID = b"\xab\x83"


class I8042:
    """The controller; ``data`` is the bus device for port 0x60 and ``command`` the one for 0x64.

    :param interrupt: raises IRQ 1, the keyboard's, an edge each time

    ``stats`` counts accesses by Firecracker's names; those wider than a byte are ``missed``.
    """

    def __init__(self, interrupt: Callable[[], None] = lambda: None) -> None:
        self._interrupt = interrupt
        self._lock = threading.Lock()  # vCPUs, and who presses keys
        self._ram = bytearray(32)
        self._ram[0] = CTR_TRANSLATE | CTR_AUX_DISABLED | CTR_KEYBOARD_DISABLED | CTR_SYSTEM
        self._output: int | None = None
        self._of_keyboard = False  # what is in _output
        self._keys = bytearray()  # what the keyboard has to say and the controller has not taken
        self._release = b""  # of the keys that are down
        self._keyboard_command: int | None = None
        self._pending: int | None = None
        self._last_was_command = False
        self.stats = dict.fromkeys(
            ("error_count", "missed_read_count", "missed_write_count", "read_count", "reset_count", "write_count"), 0
        )
        self.data = _Port(self, self._read_data, self._write_data)
        self.command = _Port(self, self._read_status, self._write_command)

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                name: bytes(value) if isinstance(value := getattr(self, f"_{name}"), bytearray) else value
                for name in _STATE
            }

    def restore(self, state: dict[str, Any]) -> None:
        ram, keys, release = (bytes(memoryview(state[name])) for name in ("ram", "keys", "release"))  # bytes alone
        if len(ram) != len(self._ram):
            raise ValueError(f"{len(ram)} bytes of RAM")
        with self._lock:
            self._ram, self._keys, self._release = bytearray(ram), bytearray(keys), release
            self._output, self._keyboard_command, self._pending = (
                None if state[name] is None else int(state[name]) & 0xFF
                for name in ("output", "keyboard_command", "pending")
            )
            self._of_keyboard, self._last_was_command = bool(state["of_keyboard"]), bool(state["last_was_command"])
            if self._output is not None and self._of_keyboard and self._ram[0] & CTR_KEYBOARD_INTERRUPT:
                self._interrupt()  # one that was on its way may not have come with the interrupt controller

    def press_ctrl_alt_del(self) -> None:
        """Press the three keys, and let go once the guest has read that; any thread, and before the guest listens, too.

        :raises VmmError: the guest has not read what was pressed before
        """
        with self._lock:
            keys = CTRL_ALT_DEL_TRANSLATED if self._ram[0] & CTR_TRANSLATE else CTRL_ALT_DEL
            if len(self._keys) + len(keys[0]) > KEYBOARD_BUFFER:
                self.stats["error_count"] += 1
                raise VmmError("the keyboard's buffer is full: the guest does not read it")
            self._keys += keys[0]
            self._release = keys[1]
            self._take_key()

    def _take_key(self) -> None:
        # From the keyboard to the controller, if it has room and listens.
        if self._output is None and not self._keys:
            self._keys += self._release
            self._release = b""
        if self._output is None and self._keys and not self._ram[0] & CTR_KEYBOARD_DISABLED:
            self._output, self._of_keyboard = self._keys.pop(0), True
            if self._ram[0] & CTR_KEYBOARD_INTERRUPT:
                self._interrupt()

    def _answer(self, value: int) -> None:
        # A driver that asks the controller wants its answer, not a key that came before.
        if self._of_keyboard and self._output is not None:
            self._keys.insert(0, self._output)
        self._output, self._of_keyboard = value, False

    def _read_data(self) -> int:
        value, self._output = self._output, None
        self._take_key()
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
            self._answer(ram[command - READ_RAM])
        elif WRITE_RAM <= command < WRITE_RAM + len(ram) or command in _WITH_PARAMETER:
            self._pending = command
        elif command == SELF_TEST:
            ram[0] |= CTR_SYSTEM
            self._answer(SELF_TEST_PASSED)
        elif command in _ANSWERS:
            self._answer(_ANSWERS[command])
        elif command in _DISABLE:
            ram[0] |= _DISABLE[command]
        elif command in _ENABLE:
            ram[0] &= 0xFF ^ _ENABLE[command]
            self._take_key()
        elif command >= PULSE_OUTPUT_PORT and not command & OUTPUT_NOT_RESET:
            self._reset()

    def _reset(self) -> None:
        self.stats["reset_count"] += 1
        raise Stop(StopReason.RESET)

    def _write_data(self, value: int) -> None:
        self._last_was_command = False
        command, self._pending = self._pending, None
        if command is None:
            self._tell_keyboard(value)
        elif command == WRITE_AUX:
            return  # for a mouse, and none is there to answer
        elif command == WRITE_OUTPUT_PORT:
            if not value & OUTPUT_NOT_RESET:
                self._reset()
        elif command in (LOOP_KEYBOARD, LOOP_AUX):
            # Also for the auxiliary loop without the status bit that says so: the driver sees at once that
            # there is no such port, and does not wait for an answer.
            self._answer(value)
        else:
            self._ram[command - WRITE_RAM] = value
            self._take_key()

    def _tell_keyboard(self, value: int) -> None:
        command, self._keyboard_command = self._keyboard_command, None
        translated = self._ram[0] & CTR_TRANSLATE
        answer = KEYBOARD_ACK
        if command is not None:
            if command == KEYBOARD_SCAN_CODES and value == 0:
                answer += SCAN_CODE_SET_TRANSLATED if translated else SCAN_CODE_SET
        elif value in (KEYBOARD_SET_LEDS, KEYBOARD_SCAN_CODES, KEYBOARD_SET_RATE):
            self._keyboard_command = value
        elif value == KEYBOARD_ECHO:
            answer = bytes((KEYBOARD_ECHO,))
        elif value == KEYBOARD_ID:
            answer += _TRANSLATED_ID if translated else _ID
        elif value == KEYBOARD_RESET:
            answer += KEYBOARD_PASSED
        elif value < KEYBOARD_SET_LEDS:  # the first command
            answer = KEYBOARD_WHAT
        # It drops what it was about to say for the answer.
        if self._of_keyboard:
            self._output = None
        self._keys[:] = answer
        self._take_key()


class _Port:
    """One of the two ports as a bus device: a byte wide, whatever width the guest uses."""

    __slots__ = ("_controller", "_get", "_put")

    def __init__(self, controller: I8042, get: Callable[[], int], put: Callable[[int], None]) -> None:
        self._controller = controller
        self._get = get
        self._put = put

    def read(self, offset: int, data: memoryview) -> None:
        data[:] = b"\xff" * len(data)
        with self._controller._lock:
            self._controller.stats["read_count" if len(data) == 1 else "missed_read_count"] += 1
            if offset == 0:
                data[0] = self._get()

    def write(self, offset: int, data: memoryview) -> None:
        with self._controller._lock:
            self._controller.stats["write_count" if len(data) == 1 else "missed_write_count"] += 1
            if offset == 0:
                self._put(data[0])
