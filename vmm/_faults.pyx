# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Fault signals, which Python cannot handle, and thread names; for ``pyvmm serve``.

A Python handler would return to the faulting instruction, which would fault again, for ever. So the handler is in C.
A real fault writes one line and ends the process. A fault signal that another process sent asks for an orderly shutdown
in the main thread. Source: the message and the exit codes are Firecracker 1.12's, src/vmm/src/signal_handler.rs.
"""

from vmm._sys cimport name_thread

cdef extern from *:
    """
    #include <signal.h>
    #include <stdio.h>
    #include <string.h>
    #include <unistd.h>
    static volatile sig_atomic_t fault_sent;
    static volatile int fault_wake = -1;
    static volatile int fault_log = -1;

    static int fault_status(int number) {
        return number == SIGBUS ? 149 : number == SIGSEGV ? 150 : number == SIGXFSZ ? 151 : 157;
    }
    static void on_fault(int number, siginfo_t *info, void *context) {
        char line[] = "pyvmm: Shutting down VM after intercepting signal NN.\\n";
        char *digits = line + sizeof line - 5;
        (void)context;
        if (info->si_code <= 0) {
            /* RLIMIT_FSIZE sends SIGXFSZ as if from this process. Ignored: write(2) also returns EFBIG. */
            if (number == SIGXFSZ && info->si_pid == getpid()) return;
            fault_sent = number;
            if (write(fault_wake, "", 1) < 0) {}
            return;
        }
        digits[0] = (char)('0' + number / 10);
        digits[1] = (char)('0' + number % 10);
        if (write(2, line, sizeof line - 1) < 0) {}
        if (fault_log >= 0 && write(fault_log, line, sizeof line - 1) < 0) {}
        _exit(fault_status(number));
    }
    static int catch_all(int wake) {
        static const int numbers[] = { SIGBUS, SIGSEGV, SIGXFSZ, SIGILL };
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
        fault_wake = wake;
        for (int i = 0; i < 4; i++)
            if (sigaction(numbers[i], &action, NULL)) return -1;
        return 0;
    }
    """
    int fault_sent
    int fault_log
    int catch_all(int wake) noexcept nogil


def catch_faults(int wake):
    """Install the handler for SIGBUS, SIGSEGV, SIGXFSZ and SIGILL.

    :param wake: a descriptor to which one byte is written when another process sent such a signal; see ``sent``.
        Borrowed for the life of the process
    :raises OSError: sigaction failed
    """
    if catch_all(wake):
        raise OSError("sigaction")


def log_to(int fd):
    """Write a fault's line to `fd` as well as to stderr; borrowed; -1: only to stderr. For ``vmm.logger.watch``."""
    global fault_log
    fault_log = fd


def sent():
    """The number of the last fault signal that another process sent, or 0."""
    return fault_sent


def set_thread_name(str name):
    """Name the calling thread, for ps and top; truncated to 15 bytes."""
    name_thread(name.encode())
