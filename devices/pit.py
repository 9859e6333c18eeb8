# SPDX-License-Identifier: Apache-2.0
"""The PC's timer (8254) and its speaker's gate, until a guest uses them. From then on KVM emulates them.

KVM's timer takes 1 to 6 ms to make, and most of the 15 ms of the end of its VM. Not every guest uses it:
Linux 6.1 with a kvm-clock and the APIC's deadline timer does not. This device keeps only control words. The first
access to a count or to the gate makes KVM's timer in that state, and later accesses go to KVM.
Source: Intel 8254 data sheet; Linux arch/x86/kvm/i8254.c, whose states after a reset and after each access these are,
and <asm/kvm.h> for the layout.
"""

from __future__ import annotations

import struct
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CONTROL = 3  # of the ports

READ_BACK = 3  # in the place of a channel
LATCH = 0  # in the place of an access
# How a count is read and written, KVM's RW_STATE_*: its low byte, its high byte, or one after the other.
LOW, HIGH, BOTH, SECOND = 1, 2, 3, 4
NO_MODE = 0xFF  # nothing was said
SQUARE_WAVE = 3
LARGEST = 0x10000  # a count of 0
SPEAKER_ON = 2  # kvm_pit_state2.flags

# struct kvm_pit_channel_state: count, latched_count, count_latched, status_latched, status, read_state, write_state,
# write_latch, rw_mode, mode, bcd, gate, count_load_time; then struct kvm_pit_state2's flags.
_CHANNEL = struct.Struct("<IH10Bq")
_FLAGS = struct.Struct("<I36x")


class _Channel:
    def __init__(self, gate: int) -> None:
        self.count, self.gate = LARGEST, gate
        self.latched = self.status_latched = self.status = 0
        self.reads = self.writes = self.latch = self.access = self.bcd = 0
        self.mode = NO_MODE

    def control(self, word: int) -> None:
        access = word >> 4 & 3
        if access == LATCH:
            self.latched = self.latched or self.access
            return
        self.access = self.reads = self.writes = access
        mode = word >> 1 & 7
        self.mode, self.bcd = mode - 4 if mode > 5 else mode, word & 1

    def latch_status(self) -> None:
        if not self.status_latched:
            out = self.mode == SQUARE_WAVE  # at the beginning of a count
            self.status = (out << 7 | self.access << 4 | self.mode << 1 | self.bcd) & 0xFF
            self.status_latched = 1

    def write(self, value: int) -> None:
        if self.writes == BOTH:
            self.latch, self.writes = value, SECOND
        else:
            self.count = (value << 8 if self.writes == HIGH else value) or LARGEST

    def read(self) -> int:
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.latched:
            self.latched = HIGH if self.latched == BOTH else 0
        elif self.reads == BOTH:
            self.reads = SECOND
        return 0  # it has just begun, with the largest count

    def pack(self) -> bytes:
        return _CHANNEL.pack(
            self.count, 0, self.latched, self.status_latched, self.status, self.reads, self.writes, self.latch,
            self.access, self.mode, self.bcd, self.gate, 0,
        )  # fmt: skip


class Pit:
    """The timer; ``speaker`` is the bus device for port 0x61.

    :param make: makes KVM's, as it is after a reset, and then gives it a ``struct kvm_pit_state2``, unless that is None
    """

    def __init__(self, make: Callable[[bytes | None], None]) -> None:
        self._make = make
        self._made = False
        self._lock = threading.Lock()
        self._channels = [_Channel(gate) for gate in (1, 1, 0)]
        self._flags = 0
        self._touched = False
        self.speaker = _Speaker(self)

    def save(self) -> bool:
        """Whether the timer is KVM's, which has its state then; False: the guest has not used it at all.

        :raises KvmError: KVM cannot make it
        """
        with self._lock:
            if self._touched:
                self._ensure_made()
            return self._made

    def make(self) -> None:
        """From here on the timer is KVM's: for who reads or sets its state. Idempotent; any thread.

        :raises KvmError: KVM cannot make it
        """
        with self._lock:
            self._ensure_made()

    def _ensure_made(self) -> None:
        if not self._made:
            state = b"".join(channel.pack() for channel in self._channels) + _FLAGS.pack(self._flags)
            self._make(state if self._touched else None)
            self._made = True

    def read(self, offset: int, data: memoryview) -> None:
        """A count, or what was latched; the control port reads as 0."""
        data[:] = bytes(len(data))
        with self._lock:
            # What another vCPU has just made answers the next one.
            if offset != CONTROL and not self._made:
                data[0] = self._channels[offset].read()
                self._touched = True
                self._ensure_made()

    def write(self, offset: int, data: memoryview) -> None:
        word = data[0]
        with self._lock:
            if self._made:
                return
            self._touched = True
            if offset != CONTROL:
                self._channels[offset].write(word)
                self._ensure_made()
            elif (index := word >> 6) != READ_BACK:
                self._channels[index].control(word)
            else:
                for index, channel in enumerate(self._channels):
                    if word & 2 << index:
                        if not word & 0x20:
                            channel.control(LATCH)
                        if not word & 0x10:
                            channel.latch_status()

    def read_gate(self) -> int:
        """Port 0x61: the gate of channel 2, the speaker, the refresh of memory that never stops, and the output."""
        with self._lock:
            self._ensure_made()
            channel = self._channels[2]
            out = channel.mode == SQUARE_WAVE
            return out << 5 | (time.monotonic_ns() >> 14 & 1) << 4 | self._flags & SPEAKER_ON | channel.gate

    def write_gate(self, value: int) -> None:
        with self._lock:
            if not self._made:
                self._channels[2].gate, self._flags = value & 1, value & SPEAKER_ON
                self._touched = True
                self._ensure_made()


class _Speaker:
    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read(self, offset: int, data: memoryview) -> None:
        data[:] = bytes((self._pit.read_gate(), *bytes(len(data) - 1)))

    def write(self, offset: int, data: memoryview) -> None:
        self._pit.write_gate(data[0])
