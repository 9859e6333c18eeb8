# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""What a process that serves asks of the C library: signals that Python cannot handle, and the names of threads.

A handler of Python's would return to the instruction that failed, for ever.
Sent by somebody, they ask for an orderly end, in the main thread. Where they are true, one line and the end.
Source: Firecracker 1.12's src/vmm/src/signal_handler.rs for words and exit codes.
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
            /* The limit on files sends SIGXFSZ, too, as if we did ourselves: write(2) says so as well. */
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
    """From here on SIGBUS, SIGSEGV, SIGXFSZ and SIGILL are ours.

    :param wake: a descriptor that is written to when one was sent; see ``sent``
    """
    if catch_all(wake):
        raise OSError("sigaction")


def log_to(int fd):
    """Write the line to `fd` as well as to stderr; borrowed, -1: none. For ``vmm.logger.watch``."""
    global fault_log
    fault_log = fd


def sent():
    """The signal that somebody sent, or 0."""
    return fault_sent


def set_thread_name(str name):
    """Name the calling thread for ps and top; at most 15 bytes are kept."""
    name_thread(name.encode())
