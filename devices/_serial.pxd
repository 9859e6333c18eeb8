# SPDX-License-Identifier: Apache-2.0
# State of one 16550A; every field is guarded by `lock`, which several vCPUs and the two console threads take.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmm._bus cimport NativeDevice

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    FIFO_SIZE = 16
    WIRE_SIZE = 4096            # bytes that the host has sent and the FIFO has not taken; a power of two
    RING_SIZE = 65536           # bytes that the guest has sent and the host has not taken; a power of two

cdef struct State:
    pthread_mutex_t lock
    pthread_cond_t output_cond  # there is output, or the port is closed
    pthread_cond_t input_cond   # the wire has room, or the port is closed
    int irq_fd                  # borrowed from the IrqLine
    int level                   # what the interrupt pin is at; an edge goes out when it rises
    int thre_pending            # transmitter empty, and the guest has not read that from IIR yet
    int sending                 # the last access was a write to THR
    int closed
    uint64_t reads, writes      # accesses of the guest's
    int rts_seen                # the guest has raised RTS once, so its absence means "wait"
    int iir_read                # the guest has asked IIR since bytes came from the wire, and was told of a cause
    uint32_t polls              # LSR reads with no other access in between
    uint8_t ier, fcr, lcr, mcr, msr, scr, dll, dlm
    uint8_t fifo[FIFO_SIZE]     # what the guest reads next is fifo[fifo_head]
    uint32_t fifo_head, fifo_count
    uint32_t looped             # the last so many of them are the guest's own, by the loopback
    uint8_t wire[WIRE_SIZE]
    uint32_t wire_head, wire_count
    uint8_t *ring               # RING_SIZE of them; pages that no output has reached cost nothing
    uint32_t ring_head, ring_count
    uint64_t taken_ns               # when output was taken last, of the monotonic clock
    int dropping                    # nobody takes output: it is lost at once
    const char *words               # looked for in what is lost; the Serial's `_words`
    uint32_t matched                # bytes of them that went by last
    int said                        # they went by

cdef class Serial(NativeDevice):
    cdef State state
    cdef object _irq            # keeps irq_fd open
    cdef bytes _words
