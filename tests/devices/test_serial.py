# SPDX-License-Identifier: Apache-2.0
"""The 16550A: registers by the data sheet, the sequences of Linux's driver, and no byte lost either way."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices._serial import Serial
from vmm.irq import IrqLine

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
DLAB = 0x80
DR, THRE, TEMT = 0x01, 0x20, 0x40
RDI, THRI, MSI = 0x01, 0x02, 0x08
DTR, RTS, OUT1, OUT2, LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
NONE = 0x01


class Port:
    """A driver's view: register reads and writes, and the edges on the interrupt line."""

    def __init__(self) -> None:
        self.irq = IrqLine(4)
        self.serial = Serial(self.irq)

    def __getitem__(self, register: int) -> int:
        data = bytearray(1)
        self.serial.read(register, memoryview(data))
        return data[0]

    def __setitem__(self, register: int, value: int) -> None:
        self.serial.write(register, memoryview(bytes([value])))

    def open(self) -> None:
        """As Linux's serial8250_do_startup and uart_startup leave it."""
        self[FCR] = 0x81
        self[LCR] = 3
        self[IER] = RDI
        self[MCR] = DTR | RTS | OUT2

    def serve(self) -> bytes:
        """As Linux's interrupt handler: until IIR says none."""
        taken = bytearray()
        while not self[IIR] & NONE:
            while self[LSR] & DR:
                taken.append(self[RBR])
            self[MSR]
        return bytes(taken)


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port()
    yield port
    port.serial.close()
    port.irq.close()


def test_reset_values(port: Port) -> None:
    assert (port[IER], port[IIR], port[MCR], port[LSR], port[SCR]) == (0, NONE, 0, THRE | TEMT, 0)
    assert port[MSR] == 0xB0, "carrier, data set ready, clear to send"


def test_scratch_register_and_divisor_latch(port: Port) -> None:
    port[SCR] = 0xA5
    port[LCR] = DLAB | 3
    port[DLL], port[DLM] = 0x0C, 0x01
    assert (port[DLL], port[DLM], port[SCR]) == (0x0C, 0x01, 0xA5)
    port[LCR] = 3
    assert (port[IER], port[LSR] & DR) == (0, 0), "the latch is not the data register"


def test_reserved_bits_read_zero(port: Port) -> None:
    port[IER] = 0xFF
    port[MCR] = 0xFF
    assert (port[IER], port[MCR]) == (0x0F, 0x1F)


def test_output_in_order(port: Port) -> None:
    for byte in b"hello":
        port[THR] = byte
    assert port.serial.wait_output() == b"hello"
    port.serial.close()
    assert port.serial.wait_output() == b""


def test_output_is_written_while_another_thread_holds_the_gil(port: Port) -> None:
    reader, writer = os.pipe()
    taken: list[tuple[bytes, int]] = []
    thread = threading.Thread(target=lambda: taken.append(port.serial.write_output(writer)))
    thread.start()
    waits = struct.pack("ihh", reader, select.POLLIN, 0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        time.sleep(0.05)  # without the GIL: the thread waits in the port
        port[THR] = ord("x")
        came = ctypes.PyDLL(None).poll(waits, 1, 10_000)  # with it
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert (came, taken) == (1, [(b"x", 1)])
    os.close(reader)
    os.close(writer)


def test_output_that_cannot_be_written_is_returned_all_the_same(port: Port) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    room = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    sent = random.Random(1).randbytes(room + 100)
    for byte in sent:
        port[THR] = byte
    assert port.serial.write_output(writer) == (sent, room)
    assert os.read(reader, 2 * room) == sent[:room]
    os.close(reader)
    port[THR] = 1
    assert port.serial.write_output(writer) == (b"\1", 0), "nobody reads"
    os.close(writer)


def test_output_for_which_there_is_no_room_is_returned_at_once(port: Port) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    sent = random.Random(3).randbytes(5000)
    for byte in sent:
        port[THR] = byte
    assert port.serial.write_output(writer, False) == (sent, select.PIPE_BUF)
    port[THR] = 1
    assert port.serial.write_output(writer, False) == (b"\1", 0)
    assert os.read(reader, 8192) == sent[: select.PIPE_BUF]
    os.close(reader)
    os.close(writer)


def test_output_around_the_end_of_the_ring_is_written_in_order(port: Port) -> None:
    for _ in range(40_000):
        port[THR] = 0
    assert len(port.serial.wait_output()) == 40_000
    sent = random.Random(2).randbytes(40_000)
    for byte in sent:
        port[THR] = byte
    file = os.memfd_create("output")
    assert port.serial.write_output(file) == (sent, 25_536), "up to the ring's end; the rest is the caller's to write"
    assert os.pread(file, 65_536, 0) == sent[:25_536]
    os.close(file)


def test_linux_detects_a_16550a(port: Port) -> None:
    # autoconfig(): the IER test, the loopback test, then the FIFO bits of IIR.
    port[IER] = 0
    assert port[IER] & 0x0F == 0
    port[IER] = 0x0F
    assert port[IER] & 0x0F == 0x0F
    port[IER] = 0
    port[MCR] = LOOP | OUT2 | RTS
    assert port[MSR] & 0xF0 == 0x90
    port[MCR] = 0
    port[FCR] = 1
    assert port[IIR] >> 6 == 3
    port[FCR] = 0
    assert port[IIR] >> 6 == 0


def test_linux_measures_a_fifo_of_16(port: Port) -> None:
    # size_fifo(): 256 bytes in loopback, what comes back is the FIFO's size.
    port[FCR] = 0x07
    port[MCR] = LOOP
    for byte in range(256):
        port[THR] = byte
    count = 0
    while port[LSR] & DR and count < 256:
        assert port[RBR] == count
        count += 1
    assert count == 16
    port[MCR] = 0
    assert port.irq.take() == 0


def test_loopback_puts_nothing_before_what_the_host_sent(port: Port) -> None:
    # What is looped back is the guest's own: a FIFO that is reset gives back only what came from the host.
    port.open()
    port.serial.feed(b"from the host")
    assert port[RBR] == ord("f")
    for _ in range(300):  # 16 bytes each time, beyond the 4 KiB that wait for the guest
        port[MCR] = LOOP
        for byte in b"0123456789abcdef":
            port[THR] = byte
        port[MCR] = DTR | RTS | OUT2
        port[FCR] = 0x83
    assert port.serve() + port.serve() == b"rom the host"  # IIR says none first: what waits is an interrupt of its own
    assert not port[LSR] & DR


def test_reset_of_the_fifo_in_loopback_keeps_what_the_host_sent(port: Port) -> None:
    port.open()
    port.serial.feed(b"typed")
    port[MCR] = LOOP
    port[THR] = ord("x")
    port[FCR] = 0x83
    port[MCR] = DTR | RTS | OUT2
    assert port.serve() + port.serve() == b"typed"


def test_a_full_wire_and_a_fifo_that_is_reset_again_and_again(port: Port) -> None:
    # feed() goes on at a wire that the FIFO's bytes came back to: it must not go round it.
    port.open()
    sent = bytes(range(256)) * 20
    feeder = threading.Thread(target=port.serial.feed, args=(sent,))
    feeder.start()
    taken = bytearray()
    while len(taken) < len(sent):
        port[FCR] = 0x83
        taken += port.serve() + port.serve()
    feeder.join()
    assert taken == sent


def test_transmitter_interrupt_comes_back_when_it_is_enabled_again(port: Port) -> None:
    # serial8250_THRE_test(): a UART that does not is worked around by a slow timer.
    port[IER] = THRI
    assert port.irq.take() == 1
    assert port[IIR] & 0x0F == 0x02
    assert port[IIR] & 0x0F == NONE, "reading IIR took it"
    port[IER] = 0
    port[IER] = THRI
    assert port.irq.take() == 1
    assert port[IIR] & 0x0F == 0x02


def test_transmitter_interrupt_after_each_burst(port: Port) -> None:
    port[IER] = THRI
    port[IIR]
    port.irq.take()
    for byte in b"sixteen bytes...":
        port[THR] = byte
    assert port.irq.take() == 1, "one edge for the burst"
    assert port[IIR] & 0x0F == 0x02


def test_driver_that_never_reads_iir_is_interrupted_for_each_byte(port: Port) -> None:
    # Writing THR resets the interrupt, the empty transmitter raises it again.
    port[IER] = THRI
    for byte in b"abc":
        assert port.irq.take() == 1
        assert port[LSR] & THRE
        port[THR] = byte
    assert port.irq.take() == 1
    assert port.serial.wait_output() == b"abc"


def test_driver_that_sends_without_end_is_interrupted_again(port: Port) -> None:
    # Linux leaves its handler after 512 rounds whatever is pending: it must not be the last interrupt.
    port[IER] = THRI
    for _ in range(512):
        port.irq.take()
        assert port[IIR] & 0x0F == 0x02
        for byte in b"sixteen bytes...":
            port[THR] = byte
    assert port.irq.take() == 1


def test_interrupt_priority(port: Port) -> None:
    port.open()
    port[IER] = RDI | THRI | MSI
    port[MCR] = LOOP
    port[MCR] = DTR | RTS
    port.serial.feed(b"x")
    assert port[IIR] & 0x0F == 0x0C, "fewer bytes than the trigger level: the timeout's identity"
    port[RBR]
    assert port[IIR] & 0x0F == 0x02
    assert port[IIR] & 0x0F == 0x00, "modem status"
    port[MSR]
    assert port[IIR] & 0x0F == NONE


@pytest.mark.parametrize(("trigger", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_receive_trigger_levels(port: Port, trigger: int, level: int) -> None:
    port.open()
    port[FCR] = trigger
    port.serial.feed(b"x" * level)
    assert port[IIR] & 0x0F == 0x04
    port[RBR]
    assert port[IIR] & 0x0F == (0x0C if level > 1 else NONE)


def test_break_and_modem_outputs_disturb_nothing(port: Port) -> None:
    port[LCR] = 0x43
    port[MCR] = 0x0F
    assert port[LSR] == THRE | TEMT and port[MSR] & 0xF0 == 0xB0


def test_wide_access_is_registers_in_a_row(port: Port) -> None:
    port[SCR] = 0x5A
    data = bytearray(4)
    port.serial.read(LCR, memoryview(data))
    assert data == bytes((3, 0, THRE | TEMT, 0xB0))


def test_input_waits_until_the_guest_listens(port: Port) -> None:
    port.serial.feed(b"typed early")
    assert not port[LSR] & DR
    # As Linux opens the port: it reads everything blindly, twice, with interrupts off.
    port[FCR] = 0x07
    port[FCR] = 0
    for register in (LSR, RBR, IIR, MSR) * 2:
        port[register]
    port.open()
    assert port.irq.take() == 1
    assert port.serve() == b"typed early"


def test_fifo_reset_loses_nothing(port: Port) -> None:
    port.open()
    port.serial.feed(bytes(range(40)))
    port[IER] = 0
    port[FCR] = 0x07
    port[FCR] = 0
    port[RBR]
    port.open()
    assert port.serve() + port.serve() + port.serve() == bytes(range(40))


def test_polling_guest_gets_input_without_interrupts(port: Port) -> None:
    port.serial.feed(b"boot loader")
    taken = bytearray()
    for _ in range(1000):
        if port[LSR] & DR:
            taken.append(port[RBR])
    assert taken == b"boot loader"


def test_rts_holds_the_input(port: Port) -> None:
    port.open()
    port[MCR] = DTR | OUT2
    port.serial.feed(b"later")
    assert not port[LSR] & DR and port.irq.take() == 0
    port[MCR] = DTR | RTS | OUT2
    assert port.irq.take() == 1
    assert port.serve() == b"later"


def test_handler_gets_out_of_its_loop_while_input_streams_in(port: Port) -> None:
    # Linux gives up after 256 bytes a pass and 512 passes; a FIFO that refills as it is read gets it there.
    port.open()
    port.serial.feed(bytes(2000))
    port.irq.take()
    assert len(port.serve()) <= 16
    assert port.irq.take() == 1, "and the rest has an edge of its own"


def test_full_ring_stops_the_transmitter_and_loses_nothing(port: Port) -> None:
    sent = bytearray()
    while port[LSR] & THRE:
        port[THR] = len(sent) & 0xFF
        sent.append(len(sent) & 0xFF)
    assert len(sent) == 65536
    port[IER] = THRI
    assert port[IIR] & NONE, "no room, no interrupt"
    port.irq.take()
    assert port.serial.wait_output() == sent
    assert port.irq.take() == 1
    assert port[LSR] & THRE and port[IIR] & 0x0F == 0x02


def test_a_stopped_transmitter_goes_on_once_output_is_dropped(port: Port) -> None:
    port.open()
    port[IER] = RDI | THRI
    while port[LSR] & THRE:
        port[THR] = 0x78
    assert port[IIR] & 0x0F == NONE
    port.irq.take()
    port.serial.drop_output(b"Kernel")
    assert port.irq.take() == 1 and port[LSR] & THRE and port[IIR] & 0x0F == 2
    for byte in b"Kern Kernel":
        assert not port.serial.said
        port[THR] = byte
    assert port.serial.said
    port.serial.keep_output()
    port[THR] = 0x79
    assert port.serial.wait_output() == b"y"


@pytest.mark.parametrize("words", [b"abca", b"a\0"])
def test_words_that_cannot_be_looked_for(port: Port, words: bytes) -> None:
    with pytest.raises(ValueError, match="first byte"):
        port.serial.drop_output(words)


def test_only_what_follows_soon_is_gathered(port: Port) -> None:
    waited = []
    for _ in range(30):
        for word in (b"a", b"b"):
            port[THR] = word[0]
            before = time.monotonic_ns()
            assert port.serial.wait_output() == word
            waited.append(time.monotonic_ns() - before)
            if word == b"a":
                taken = time.monotonic_ns()
        assert time.monotonic_ns() - taken > 900_000
        time.sleep(0.001)
    assert min(waited) < 500_000  # of 30 that begin a burst, the quickest


def test_one_megabyte_through_a_guest_that_throttles(port: Port) -> None:
    data = random.Random(1).randbytes(1 << 20)
    port.open()
    feeder = threading.Thread(target=port.serial.feed, args=(data,))
    feeder.start()
    taken = bytearray()
    dice = random.Random(2)
    while len(taken) < len(data):
        taken += port.serve()
        if dice.random() < 0.01:
            port[MCR] = DTR | OUT2
            held = port.serve()
            assert len(held) <= 16, "only what was in the FIFO already"
            taken += held
            port[MCR] = DTR | RTS | OUT2
    feeder.join(10)
    assert not feeder.is_alive()
    assert taken == data


@settings(max_examples=200)
@given(st.data())
def test_bytes_keep_their_order_both_ways(data: st.DataObject) -> None:
    # Any mix of Linux's own moves: served interrupts, throttling, the port closed and opened, echo.
    port = Port()
    port.open()
    fed, taken, sent, heard = bytearray(), bytearray(), bytearray(), bytearray()
    moves = st.sampled_from(["feed", "serve", "throttle", "unthrottle", "reopen", "send", "drain", "printk"])
    for move in data.draw(st.lists(moves, max_size=60)):
        if move == "feed":
            piece = data.draw(st.binary(max_size=50))
            port.serial.feed(piece)
            fed += piece
        elif move == "serve":
            taken += port.serve()
        elif move == "throttle":
            port[MCR] = DTR | OUT2
        elif move == "unthrottle":
            port[MCR] = DTR | RTS | OUT2
        elif move == "reopen":
            port[IER] = 0
            port[MCR] = OUT2
            port[FCR] = 0x07
            port[FCR] = 0
            for register in (LSR, RBR, IIR, MSR):
                port[register]
            port.open()
        elif move == "drain" and len(heard) < len(sent):
            heard += port.serial.wait_output()
        elif move in ("send", "printk"):
            before = port[IER]
            if move == "printk":
                port[IER] = 0
            for byte in data.draw(st.binary(max_size=20)):
                assert port[LSR] & THRE
                port[THR] = byte
                sent.append(byte)
            port[IER] = before
    port[MCR] = DTR | RTS | OUT2
    while port.irq.take() or port[LSR] & DR:
        taken += port.serve()
    assert taken == fed
    port.serial.close()
    while piece := port.serial.wait_output():
        heard += piece
    assert heard == sent
    port.irq.close()


def test_two_vcpus_send_while_a_third_receives(port: Port) -> None:
    data = random.Random(3).randbytes(1 << 16)
    port.open()
    taken, heard = bytearray(), bytearray()

    def send(tag: int) -> None:
        for count in range(15000):
            port[THR] = tag | count & 0x7F

    def hear() -> None:
        while piece := port.serial.wait_output():
            heard.extend(piece)

    senders = [threading.Thread(target=send, args=(tag,)) for tag in (0, 0x80)]
    feeder = threading.Thread(target=port.serial.feed, args=(data,))
    threads = [*senders, feeder, threading.Thread(target=hear)]
    for thread in threads:
        thread.start()
    while len(taken) < len(data):
        taken += port.serve()
    for sender in senders:
        sender.join(30)
    port.serial.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert taken == data
    for tag in (0, 0x80):
        of_one = [byte for byte in heard if byte & 0x80 == tag]
        assert of_one == [tag | count & 0x7F for count in range(15000)]


def test_accesses_are_counted(port: Port) -> None:
    port[SCR] = 1
    port[THR] = 2
    assert port[SCR] == 1
    assert port.serial.stats == {"read_count": 1, "write_count": 2}


def test_a_restored_port_goes_on_where_the_saved_one_was(port: Port) -> None:
    port.open()
    port[LCR] = DLAB | 3
    port[DLL], port[DLM] = 0x0C, 0x01
    port[LCR], port[SCR] = 3, 0x5A
    port[IER] = RDI | THRI
    port.serial.feed(b"in the FIFO")
    assert port[RBR] == ord("i")
    port[IIR]
    registers = [port[register] for register in (IER, LCR, MCR, MSR, SCR)]
    state = port.serial.save()
    assert state["fifo"] == b"n the FIFO"

    other = Port()
    other.serial.restore(state)
    assert select.select([other.irq.fd], [], [], 0)[0], "the input is a cause that is pending"
    assert [other[register] for register in (IER, LCR, MCR, MSR, SCR)] == registers
    assert other.serve() == b"n the FIFO"
    other[LCR] = DLAB | 3
    assert (other[DLL], other[DLM]) == (0x0C, 0x01)
    other[LCR] = 3
    other[THR] = ord("x")
    assert other.serial.wait_output() == b"x"
    assert other.serial.save() | {"thre_pending": 0, "fifo": b""} == state | {"thre_pending": 0, "fifo": b""}
    with pytest.raises(ValueError, match="FIFO has 17 bytes, at most 16 are allowed"):
        other.serial.restore(state | {"fifo": bytes(17)})
    other.serial.close()
    other.irq.close()


def test_close_ends_every_wait(port: Port) -> None:
    taker = threading.Thread(target=port.serial.wait_output)
    feeder = threading.Thread(target=port.serial.feed, args=(bytes(1 << 20),))
    taker.start()
    feeder.start()
    port.serial.close()
    taker.join(10)
    feeder.join(10)
    assert not taker.is_alive() and not feeder.is_alive()


def test_who_takes_output_after_the_end_touches_no_descriptor(port: Port) -> None:
    # Its owner closes the line after the port; a console whose reader was slow takes the rest whenever that reads.
    while port[LSR] & THRE:
        port[THR] = 0
    port[IER] = THRI
    port.serial.close()
    port.irq.take()
    assert len(port.serial.wait_output()) == 65536
    assert port.irq.take() == 0


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
            st.tuples(st.just("read"), st.integers(0, 7), st.just(0)),
            st.tuples(st.just("feed"), st.binary(max_size=40), st.just(0)),
        ),
        max_size=80,
    )
)
def test_any_driver_at_all(program: list[tuple[str, object, int]]) -> None:
    port = Port()
    fed, read, sent = 0, 0, 0
    for verb, what, value in program:
        if verb == "feed":
            assert isinstance(what, bytes)
            port.serial.feed(what)
            fed += len(what)
        elif verb == "write":
            assert isinstance(what, int)
            sent += what == THR
            port[what] = value
        else:
            assert isinstance(what, int)
            if what == RBR and port[LSR] & DR:
                read += 1
            port[what]
    assert read <= fed + sent
    port.serial.close()
    output = b""
    while data := port.serial.wait_output():
        output += data
    assert len(output) <= sent
    port.irq.close()


@pytest.mark.parametrize("fifo", [0, 1], ids=["8250", "16550"])
def test_a_driver_that_never_reads_iir_gets_byte_after_byte(fifo: int) -> None:
    # One byte an interrupt, taken from RBR and nothing else asked, as tiny kernels and bootloaders do.
    irq = IrqLine(4)
    port = Serial(irq)
    port.write(2, bytes([fifo]))
    port.write(4, b"\x0b")  # DTR, RTS, OUT2
    port.write(1, b"\x01")
    threading.Thread(target=port.feed, args=(b"abcdefgh" * 8,), daemon=True).start()
    got = b""
    while len(got) < 64:
        assert select.select([irq.fd], [], [], 5)[0], f"no interrupt after {got!r}"
        os.eventfd_read(irq.fd)
        byte = bytearray(1)
        if fifo:  # it empties the FIFO, as LSR says
            lsr = bytearray(1)
            port.read(5, lsr)
            while lsr[0] & 1:
                port.read(0, byte)
                got += byte
                port.read(5, lsr)
        else:
            port.read(0, byte)
            got += byte
    assert got == b"abcdefgh" * 8
    port.close()
    irq.close()
