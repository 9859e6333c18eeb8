# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""A 16550A serial port in C: a guest's console output costs no Python object and no GIL.

Output goes to a ring from which a console thread takes it (``wait_output``). While the ring is full, THRE stays clear
and the guest waits, as on a slow line: Linux's tty layer for ever, its printk for 10 ms a byte. Input from ``feed``
stays "on the wire" until the FIFO is empty and the guest is ready for it. Then the FIFO is the first bytes of the wire.

Source: National Semiconductor PC16550D data sheet, section 8 (registers); Linux
drivers/tty/serial/8250/8250_port.c.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from vmm._bus cimport ACCESS_DONE, NativeDevice
from vmm._sys cimport (
    CLOCK_MONOTONIC, clock_ns, eventfd_write, nap_ns, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock,
)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass
    int pthread_cond_init(pthread_cond_t *c, void *attributes)
    int pthread_cond_destroy(pthread_cond_t *c)
    int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
    int pthread_cond_broadcast(pthread_cond_t *c)

cdef extern from *:
    """
    #include <limits.h>
    #include <poll.h>
    /* Whether a write of PIPE_BUF bytes would not wait. */
    static inline int serial_room(int fd) {
        struct pollfd p = { .fd = fd, .events = POLLOUT };
        return poll(&p, 1, 0) == 1 && p.revents == POLLOUT;
    }
    """
    bint serial_room(int fd) noexcept nogil
    enum: PIPE_BUF

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buf, size_t count)

cdef extern from "<linux/serial_reg.h>" nogil:
    # Registers, by offset.
    enum: UART_RX, UART_TX, UART_IER, UART_IIR, UART_FCR, UART_LCR, UART_MCR, UART_LSR, UART_MSR, UART_SCR
    enum: UART_IER_RDI, UART_IER_THRI, UART_IER_MSI
    enum: UART_IIR_NO_INT, UART_IIR_MSI, UART_IIR_THRI, UART_IIR_RDI, UART_IIR_RX_TIMEOUT
    enum: UART_FCR_ENABLE_FIFO, UART_FCR_CLEAR_RCVR, UART_LCR_DLAB
    enum: UART_MCR_DTR, UART_MCR_RTS, UART_MCR_OUT1, UART_MCR_OUT2, UART_MCR_LOOP
    enum: UART_LSR_DR, UART_LSR_THRE, UART_LSR_TEMT
    enum: UART_MSR_ANY_DELTA, UART_MSR_CTS, UART_MSR_DSR, UART_MSR_RI, UART_MSR_DCD

cdef enum:
    FIFO_SIZE = 16
    WIRE_SIZE = 4096            # bytes that the host has sent and the guest has not read; a power of two
    RING_SIZE = 65536           # bytes that the guest has sent and the host has not taken; a power of two
    IIR_FIFO = 0xc0             # in IIR while the FIFO is enabled
    # A driver that waits for the transmitter reads LSR once or twice. A driver that reads it this many times in a
    # row polls for input.
    POLLING = 16
    # The console thread takes the first bytes of a burst at once, so that a key's echo does not wait. Then it lets
    # output gather: a boot log takes hundreds of writes instead of thousands.
    GATHER_NS = 1_000_000

# State of one 16550A. `lock` guards every field: several vCPUs and the two console threads use them.
cdef struct State:
    pthread_mutex_t lock
    pthread_cond_t output_cond  # signals output, or that the port was closed
    pthread_cond_t input_cond   # signals room on the wire, or that the port was closed
    int irq_fd                  # borrowed from the IrqLine
    int level                   # level of the interrupt pin; a rise sends an edge
    int thre_pending            # the transmitter is empty and the guest has not yet read that from IIR
    int sending                 # the last access was a write to THR
    int closed
    uint64_t reads, writes      # accesses by the guest
    int rts_seen                # the guest has raised RTS once, so a low RTS means "wait"
    int iir_read                # since the last refill the guest has read a cause from IIR
    uint32_t polls              # LSR reads with no other access in between
    uint8_t ier, fcr, lcr, mcr, msr, scr, dll, dlm
    uint32_t fifo_count         # bytes in the FIFO: the first ones of the wire, and behind them those of `loop`
    uint8_t loop[FIFO_SIZE]
    uint32_t looped             # the number of bytes in `loop`: what the guest sent to itself
    uint8_t wire[WIRE_SIZE]
    uint32_t wire_head, wire_count
    uint8_t *ring               # RING_SIZE bytes; pages that were never written take no memory
    uint32_t ring_head, ring_count
    uint64_t taken_ns           # when output was last taken, CLOCK_MONOTONIC
    int dropping                # output is discarded at once
    const char *words           # searched for in discarded output; borrowed from the Serial's `_words`
    uint32_t matched            # bytes of `words` matched so far


cdef inline int wants_input(State *s) noexcept nogil:
    # Linux reads and discards RBR while it opens and closes the port, with interrupts off. So input must stay on the
    # wire until the guest listens, or the first bytes typed (or piped) are lost.
    if s.mcr & UART_MCR_LOOP or (s.rts_seen and not s.mcr & UART_MCR_RTS):
        return 0
    return s.ier & UART_IER_RDI or s.polls >= POLLING


cdef int cause(State *s) noexcept nogil:
    # The pending interrupt with the highest priority, as IIR shows it. There are no line errors.
    cdef uint32_t trigger
    if s.ier & UART_IER_RDI and s.fifo_count:
        if not s.fcr & UART_FCR_ENABLE_FIFO:
            return UART_IIR_RDI
        trigger = 1 if s.fcr >> 6 == 0 else 4 if s.fcr >> 6 == 1 else 8 if s.fcr >> 6 == 2 else 14
        return UART_IIR_RDI if s.fifo_count >= trigger else UART_IIR_RX_TIMEOUT
    if s.ier & UART_IER_THRI and s.thre_pending:
        return UART_IIR_THRI
    if s.ier & UART_IER_MSI and s.msr & UART_MSR_ANY_DELTA:
        return UART_IIR_MSI
    return UART_IIR_NO_INT


cdef void update(State *s) noexcept nogil:
    # The line is edge triggered at the IOAPIC. The pin stays high while any cause is pending. Drivers serve causes
    # until IIR reports none, so they miss nothing between two edges.
    cdef int level = cause(s) != UART_IIR_NO_INT
    if level and not s.level:
        eventfd_write(s.irq_fd, 1)      # if the counter is full, an edge is already pending
    s.level = level


cdef void refill(State *s) noexcept nogil:
    # Move input from the wire to the FIFO, only when the FIFO is empty. If the guest reads IIR, wait until it has read
    # "no cause": a FIFO that fills while Linux's handler reads it keeps the handler in its loop until it gives up, with
    # the pin high and no further edge.
    cdef uint32_t room = FIFO_SIZE if s.fcr & UART_FCR_ENABLE_FIFO else 1
    if s.fifo_count or not s.wire_count or not wants_input(s):
        return
    s.fifo_count = min(room, s.wire_count)
    s.iir_read = 0
    pthread_cond_broadcast(&s.input_cond)   # what was in the FIFO before left room on the wire


cdef void look_for_words(State *s, uint8_t byte) noexcept nogil:
    # The first byte of `words` occurs only once in it, so after a mismatch a match can only begin at this byte.
    if s.words[s.matched]:      # else there are none, or they were found
        s.matched = s.matched + 1 if byte == <uint8_t>s.words[s.matched] else byte == <uint8_t>s.words[0]


cdef void transmit(State *s, uint8_t byte) noexcept nogil:
    if s.mcr & UART_MCR_LOOP:
        if s.fifo_count < FIFO_SIZE:
            s.loop[s.looped] = byte
            s.looped += 1
            s.fifo_count += 1
    elif s.dropping:
        look_for_words(s, byte)
    elif s.ring_count < RING_SIZE:
        # THRE is clear while the ring is full. A guest that writes anyway loses the byte, as on a real UART.
        s.ring[(s.ring_head + s.ring_count) % RING_SIZE] = byte
        s.ring_count += 1
        if s.ring_count == 1:
            pthread_cond_broadcast(&s.output_cond)
    s.thre_pending = s.ring_count < RING_SIZE


cdef void set_modem_lines(State *s) noexcept nogil:
    # The terminal is always present and ready. In loopback mode the outputs are wired to the inputs.
    cdef uint8_t lines = UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD
    cdef uint8_t changed
    if s.mcr & UART_MCR_LOOP:
        lines = (UART_MSR_CTS if s.mcr & UART_MCR_RTS else 0) | (UART_MSR_DSR if s.mcr & UART_MCR_DTR else 0) \
            | (UART_MSR_RI if s.mcr & UART_MCR_OUT1 else 0) | (UART_MSR_DCD if s.mcr & UART_MCR_OUT2 else 0)
    changed = (s.msr ^ lines) >> 4
    if changed & 4 and lines & UART_MSR_RI:
        changed &= ~4       # the delta bit of the ring indicator is set by the trailing edge only
    s.msr = lines | (s.msr & UART_MSR_ANY_DELTA) | changed


cdef uint8_t read_register(State *s, uint64_t offset) noexcept nogil:
    cdef uint8_t value
    cdef int pending
    s.sending = 0
    s.polls = s.polls + 1 if offset == UART_LSR else 0
    if offset == UART_RX:
        if s.lcr & UART_LCR_DLAB:
            return s.dll
        if not s.fifo_count:
            return 0
        if s.fifo_count > s.looped:
            value = s.wire[s.wire_head]
            s.wire_head = (s.wire_head + 1) % WIRE_SIZE
            s.wire_count -= 1
        else:
            value = s.loop[0]
            s.looped -= 1
            memmove(s.loop, &s.loop[1], s.looped)
        s.fifo_count -= 1
        if not s.fifo_count and not s.iir_read and s.ier & UART_IER_RDI:
            update(s)       # for drivers that never read IIR: the pin falls and rises again
            refill(s)
        return value
    if offset == UART_IER:
        return s.dlm if s.lcr & UART_LCR_DLAB else s.ier
    if offset == UART_IIR:
        pending = cause(s)
        s.iir_read = 1
        if pending == UART_IIR_THRI:
            s.thre_pending = 0
        elif pending == UART_IIR_NO_INT:
            s.iir_read = 0
            refill(s)       # the handler read "no cause" and returns, so the refill raises a new edge
        return pending | (IIR_FIFO if s.fcr & UART_FCR_ENABLE_FIFO else 0)
    if offset == UART_LCR:
        return s.lcr
    if offset == UART_MCR:
        return s.mcr
    if offset == UART_LSR:
        value = UART_LSR_THRE | UART_LSR_TEMT if s.ring_count < RING_SIZE else 0
        value |= UART_LSR_DR if s.fifo_count else 0
        if not s.ier & UART_IER_RDI or s.polls >= POLLING:
            refill(s)       # a polling guest has just seen the FIFO empty
        return value
    if offset == UART_MSR:
        value = s.msr
        s.msr &= ~UART_MSR_ANY_DELTA
        return value
    return s.scr


cdef void write_register(State *s, uint64_t offset, uint8_t value) noexcept nogil:
    cdef int sending = s.sending
    s.sending = 0
    s.polls = 0
    if offset == UART_TX:
        if s.lcr & UART_LCR_DLAB:
            s.dll = value
        else:
            if not sending:
                # The pin falls and rises once for a burst of bytes. So a driver that sends one byte for each interrupt
                # and never reads IIR is interrupted again.
                s.thre_pending = 0
                update(s)
            s.sending = 1
            transmit(s, value)
    elif offset == UART_IER:
        if s.lcr & UART_LCR_DLAB:
            s.dlm = value
        else:
            # Enabling the transmitter interrupt while the transmitter is empty raises it at once; Linux tests for that.
            if value & UART_IER_THRI and not s.ier & UART_IER_THRI and s.ring_count < RING_SIZE:
                s.thre_pending = 1
            s.ier = value & 0x0f
            refill(s)
    elif offset == UART_FCR:
        if (value ^ s.fcr) & UART_FCR_ENABLE_FIFO or value & UART_FCR_CLEAR_RCVR:
            # A guest that resets its FIFO is not ready for input yet: what came by the wire stays there.
            s.fifo_count = s.looped = 0
        s.fcr = value & 0xc9 if value & UART_FCR_ENABLE_FIFO else 0
    elif offset == UART_LCR:
        s.lcr = value
    elif offset == UART_MCR:
        s.mcr = value & 0x1f
        set_modem_lines(s)
        if not s.mcr & UART_MCR_LOOP and s.mcr & UART_MCR_RTS:
            s.rts_seen = 1
            refill(s)
    elif offset == UART_SCR:
        s.scr = value


cdef int serial_access(void *ctx, uint64_t offset, uint8_t *data, uint32_t size, int is_write) noexcept nogil:
    cdef State *s = <State *>ctx
    cdef uint32_t i
    pthread_mutex_lock(&s.lock)
    if is_write:
        s.writes += 1
    else:
        s.reads += 1
    for i in range(size):       # a wide access covers consecutive registers
        if is_write:
            write_register(s, offset + i, data[i])
        else:
            data[i] = read_register(s, offset + i)
    update(s)
    pthread_mutex_unlock(&s.lock)
    return ACCESS_DONE


cdef class Serial(NativeDevice):
    """A 16550A serial port, at 8 I/O ports: FIFO, interrupts, modem lines, loopback.

    :param irq: its interrupt line; borrowed: the owner closes it after this device
    """
    cdef State state
    cdef object _irq            # keeps state.irq_fd open
    cdef bytes _words

    def __cinit__(self, irq):
        cdef State *s = &self.state
        pthread_mutex_init(&s.lock, NULL)
        pthread_cond_init(&s.output_cond, NULL)
        pthread_cond_init(&s.input_cond, NULL)
        s.ring = <uint8_t *>malloc(RING_SIZE)
        if s.ring == NULL:
            raise MemoryError()
        self._irq = irq
        s.irq_fd = irq.fd
        s.dll = 1               # 115200 baud, for a guest that asks
        s.lcr = 3               # 8 bits, no parity
        s.thre_pending = 1
        s.msr = UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD
        self.access = serial_access
        self.ctx = s

    def __dealloc__(self):
        pthread_cond_destroy(&self.state.output_cond)
        pthread_cond_destroy(&self.state.input_cond)
        pthread_mutex_destroy(&self.state.lock)
        free(self.state.ring)

    def read(self, uint64_t offset, data):
        cdef uint8_t[::1] view = data
        serial_access(&self.state, offset, &view[0], <uint32_t>view.shape[0], 0)

    def write(self, uint64_t offset, data):
        cdef const uint8_t[::1] view = data
        serial_access(&self.state, offset, <uint8_t *>&view[0], <uint32_t>view.shape[0], 1)

    @property
    def stats(self):
        return {"read_count": self.state.reads, "write_count": self.state.writes}

    def save(self):
        """The registers and the FIFO, as a dict. It has neither the output not yet taken nor the input on the wire."""
        cdef State *s = &self.state
        cdef uint32_t i
        pthread_mutex_lock(&s.lock)
        state = {
            # The ring is not saved, so the transmitter of a restored port is empty.
            "thre_pending": s.thre_pending or s.ring_count == RING_SIZE,
            "rts_seen": s.rts_seen, "ier": s.ier, "fcr": s.fcr, "lcr": s.lcr,
            "mcr": s.mcr, "msr": s.msr, "scr": s.scr, "dll": s.dll, "dlm": s.dlm, "looped": s.looped,
            "fifo": bytes([s.wire[(s.wire_head + i) % WIRE_SIZE] for i in range(s.fifo_count - s.looped)])
            + bytes([s.loop[i] for i in range(s.looped)]),
        }
        pthread_mutex_unlock(&s.lock)
        return state

    def restore(self, state):
        """Restore the dict from ``save`` in a new port, and raise the interrupt if a cause is pending.

        :raises ValueError: the FIFO is too long
        """
        cdef State *s = &self.state
        cdef bytes fifo = state["fifo"]
        if len(fifo) > FIFO_SIZE:
            raise ValueError(f"the serial port's FIFO has {len(fifo)} bytes, at most {FIFO_SIZE} are allowed")
        s.thre_pending, s.rts_seen = bool(state["thre_pending"]), bool(state["rts_seen"])
        s.ier, s.fcr, s.lcr, s.mcr = state["ier"], state["fcr"], state["lcr"], state["mcr"]
        s.msr, s.scr, s.dll, s.dlm = state["msr"], state["scr"], state["dll"], state["dlm"]
        s.fifo_count = len(fifo)
        s.looped = min(state.get("looped", 0), len(fifo))   # states of earlier versions lack it
        s.wire_head, s.wire_count = 0, s.fifo_count - s.looped
        memcpy(s.wire, <const char *>fifo, s.wire_count)
        memcpy(s.loop, <const char *>fifo + s.wire_count, s.looped)
        # Raise a new edge if a cause is pending: the interrupt controller may have been saved before the last one
        # arrived.
        s.level = 0
        pthread_mutex_lock(&s.lock)
        update(s)
        pthread_mutex_unlock(&s.lock)

    def feed(self, data):
        """Send `data` (bytes-like) to the guest. Returns when all of it is on the wire, at most 4 KiB ahead of the
        guest.

        Blocks, without the GIL, while the guest does not read or holds RTS low. ``close`` ends the wait; the rest of
        `data` is lost.
        """
        cdef const uint8_t[::1] view = memoryview(data).cast("B")
        cdef State *s = &self.state
        cdef Py_ssize_t done = 0, size = view.shape[0]
        with nogil:
            pthread_mutex_lock(&s.lock)
            while done < size and not s.closed:
                if s.wire_count == WIRE_SIZE:
                    pthread_cond_wait(&s.input_cond, &s.lock)
                    continue
                s.wire[(s.wire_head + s.wire_count) % WIRE_SIZE] = view[done]
                s.wire_count += 1
                done += 1
                if done == size or s.wire_count == WIRE_SIZE:
                    refill(s)
                    update(s)
            pthread_mutex_unlock(&s.lock)

    def wait_output(self):
        """Take the guest's output. Waits, without the GIL, until there is some. Only one thread may call this.

        :returns: at most 64 KiB; ``b""`` once the port is closed and all output was taken
        """
        return self.write_output(-1)[0]

    def write_output(self, int fd, bint wait=True):
        """As ``wait_output``, and write it, before this waits for the GIL, which may take longer than the guest took.

        :param fd: borrowed
        :param wait: False: write only as much as a pipe takes at once
        :returns: the output, and how many of its bytes were written: all, some, or none where writing failed
        """
        cdef State *s = &self.state
        cdef uint32_t count, first
        cdef ssize_t written = 0
        cdef uint64_t since
        cdef bytes taken
        cdef char *room
        with nogil:
            pthread_mutex_lock(&s.lock)
            while not s.ring_count and not s.closed:
                pthread_cond_wait(&s.output_cond, &s.lock)
            since = clock_ns(CLOCK_MONOTONIC) - s.taken_ns
            if since < GATHER_NS and not s.closed and s.ring_count < RING_SIZE / 2:
                pthread_mutex_unlock(&s.lock)
                nap_ns(GATHER_NS - since)
                pthread_mutex_lock(&s.lock)
            s.taken_ns = clock_ns(CLOCK_MONOTONIC)
            count = s.ring_count
            pthread_mutex_unlock(&s.lock)
            # Only this thread removes bytes from the ring, so `count` bytes are still there.
            first = min(count, RING_SIZE - s.ring_head)
            if fd >= 0 and count and (wait or serial_room(fd)):
                written = max(0, write(fd, &s.ring[s.ring_head], first if wait else min(first, <uint32_t>PIPE_BUF)))
        taken = PyBytes_FromStringAndSize(NULL, count)
        room = PyBytes_AS_STRING(taken)
        with nogil:
            pthread_mutex_lock(&s.lock)
            memcpy(room, &s.ring[s.ring_head], first)
            memcpy(room + first, &s.ring[0], count - first)
            if count and s.ring_count == RING_SIZE:
                s.thre_pending = 1      # the ring was full: the transmitter is ready again
            s.ring_head = (s.ring_head + count) % RING_SIZE
            s.ring_count -= count
            if not s.closed:            # its owner closes the line after the port
                update(s)
            pthread_mutex_unlock(&s.lock)
        return taken, written

    def drop_output(self, bytes words=b""):
        """Discard the guest's output from now on, and the output that no thread has taken yet.

        :param words: searched for in the output from now on (see ``said``); no byte is 0, and the first byte occurs
            once
        :raises ValueError: `words` breaks these rules
        """
        cdef State *s = &self.state
        if 0 in words or words.find(words[:1], 1) > 0:
            raise ValueError(f"words {words!r}: a NUL is not allowed, and the first byte must occur only once")
        pthread_mutex_lock(&s.lock)
        self._words = words
        s.words, s.matched = words, 0
        s.dropping = 1
        if s.ring_count == RING_SIZE:
            s.thre_pending = 1          # the ring was full: the transmitter is ready again
        s.ring_count = 0
        update(s)
        pthread_mutex_unlock(&s.lock)

    def keep_output(self):
        """Stop discarding: ``wait_output`` returns the guest's output from now on."""
        pthread_mutex_lock(&self.state.lock)
        self.state.dropping = 0
        pthread_mutex_unlock(&self.state.lock)

    @property
    def said(self):
        """Whether the guest has sent the ``words`` given to ``drop_output``."""
        return bool(self._words) and self.state.matched == <uint32_t>len(self._words)

    def close(self):
        """Wake ``feed`` and ``wait_output``. The guest can still access the port. Idempotent."""
        cdef State *s = &self.state
        with nogil:
            pthread_mutex_lock(&s.lock)
            s.closed = 1
            pthread_cond_broadcast(&s.output_cond)
            pthread_cond_broadcast(&s.input_cond)
            pthread_mutex_unlock(&s.lock)
