# SPDX-License-Identifier: Apache-2.0
# State of one 16550A. `lock` guards every field: several vCPUs and the two console threads use them.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmm._bus cimport NativeDevice
from vmm._sys cimport pthread_mutex_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    FIFO_SIZE = 16
    WIRE_SIZE = 4096            # bytes that the host has sent and the FIFO has not taken; a power of two
    RING_SIZE = 65536           # bytes that the guest has sent and the host has not taken; a power of two

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
    uint8_t fifo[FIFO_SIZE]     # what the guest reads next is fifo[fifo_head]
    uint32_t fifo_head, fifo_count
    uint32_t looped             # the number of loopback bytes, always the last in the FIFO
    uint8_t wire[WIRE_SIZE]
    uint32_t wire_head, wire_count
    uint8_t *ring               # RING_SIZE bytes; pages that were never written take no memory
    uint32_t ring_head, ring_count
    uint64_t taken_ns               # when output was last taken, CLOCK_MONOTONIC
    int dropping                    # output is discarded at once
    const char *words               # searched for in discarded output; borrowed from the Serial's `_words`
    uint32_t matched                # bytes of `words` matched so far
    int said                        # `words` was found

cdef class Serial(NativeDevice):
    cdef State state
    cdef object _irq            # keeps irq_fd open
    cdef bytes _words
