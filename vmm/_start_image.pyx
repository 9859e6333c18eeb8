# SPDX-License-Identifier: Apache-2.0
"""The interpreter's half of a start image (``vmm/start_image.h``): a process that stands still, and goes on in another.

Source: glibc's ``sysdeps/x86_64/nptl/tls.h`` and ``nptl/descr.h``; set_tid_address(2), get_robust_list(2), rseq(2).
"""

from libc.errno cimport errno

from vmm.errors import HostError

cdef extern from *:
    """
    #include <errno.h>
    #include <signal.h>
    #include <string.h>
    #include <unistd.h>
    #include <asm/prctl.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include "start_image.h"

    enum { TID_OFFSET = 0x2d0, ROBUST_LIST_BYTES = 24 };
    /* The index of cpu_id in a restartable sequence, and what it is without a CPU's number. */
    enum { RSEQ_CPU = 1, RSEQ_UNKNOWN = -1, RSEQ_FAILED = -2 };

    /* Where the C library believes the heap to end. No other C library has this name. */
    extern void *__curbrk __attribute__((weak));

    static struct image_given *image_handed;
    static uint64_t image_registers[3];
    static uint64_t image_thread, image_robust_list;

    /* What the kernel knows of this thread, and what the C library knows of the kernel. Returns an errno. */
    static int image_look(void)
    {
        size_t length = 0;
        if (syscall(SYS_arch_prctl, ARCH_GET_FS, &image_thread)) return errno;
        if (syscall(SYS_get_robust_list, 0, &image_robust_list, &length)) return errno;
        if (&__curbrk == NULL || length != ROBUST_LIST_BYTES) return ENOSYS;
        return *(int *)(image_thread + TID_OFFSET) == syscall(SYS_gettid) ? 0 : ENOSYS;
    }

    /* Tell each of them about the other, in the process that goes on. */
    static void image_adopt(void)
    {
        /* The kernel's heap is the launcher's. No sbrk() succeeds from here on; malloc uses mmap() then. */
        __curbrk = (void *)-4096L;
        environ = image_handed->environ;
        *(volatile int *)(image_thread + TID_OFFSET) = syscall(SYS_set_tid_address, image_thread + TID_OFFSET);
        syscall(SYS_set_robust_list, image_robust_list, ROBUST_LIST_BYTES);
        if (rseq_bytes()) {
            uint32_t *sequence = (void *)(image_thread + __rseq_offset);
            memset(sequence, 0, rseq_bytes()); /* the kernel refuses what looks as if it were in use */
            sequence[RSEQ_CPU] = RSEQ_UNKNOWN;
            if (syscall(SYS_rseq, sequence, rseq_bytes(), 0, RSEQ_SIGNATURE)) sequence[RSEQ_CPU] = RSEQ_FAILED;
        }
        syscall(SYS_rt_sigprocmask, SIG_SETMASK, &image_handed->mask, NULL, sizeof image_handed->mask);
    }

    /* Returns the child's pid to its parent, and 0 wherever the child goes on. Its frame, its stack and the address
       behind this are all that is needed there: the compiler keeps nothing in another register. */
    static __attribute__((noinline)) pid_t image_hold(void)
    {
        pid_t child = fork();
        if (child != 0) return child;
        int goes_on;
        uint64_t *to = image_registers;
        __asm__ volatile("movq %%rbp, (%[to]); movq %%rsp, 16(%[to]); leaq 1f(%%rip), %%rax; movq %%rax, 8(%[to]);"
                         "xorl %%eax, %%eax; 1:"
                         : "=&a"(goes_on), [to] "+b"(to) /* which is another value where it goes on */
                         : : "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory",
                           "cc");
        if (!goes_on) {
            prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody else would wake or end it */
            for (;;) raise(SIGSTOP);
        }
        image_adopt();
        return 0;
    }
    """
    ctypedef unsigned long long uint64_t
    ctypedef int pid_t
    enum:
        IMAGE_CPU_WORDS
    ctypedef struct given_t "struct image_given":
        int argc, fd, held
        char **argv
        char **environ
        const char *name
        const char *socket
        uint64_t ignored
    given_t *given "image_handed"
    uint64_t image_registers[3]
    uint64_t image_thread
    int image_look() nogil
    pid_t image_hold() nogil
    void image_cpu(uint64_t *words) nogil


def hold():
    """Copy this process; the copy stops itself. Only for a process with one thread. Of its descriptors the
    launcher opens those of libraries again.

    :returns: the copy's pid, which is the caller's to wait for and to kill; 0 wherever the copy goes on
    :raises HostError: the process cannot be copied, or its C library is not glibc
    """
    cdef int error = image_look()
    if error:
        raise HostError(error, "find what glibc keeps for a thread")
    cdef pid_t child = image_hold()
    if child < 0:
        raise HostError(errno, "copy the process")
    return child


def addresses():
    """Where the copy stands: the base of its FS segment; of the pointer to what it will be given; of its registers."""
    return image_thread, <uint64_t>&given, <uint64_t>&image_registers[0]


def cpu_words():
    """What an image must have in common with the CPU that it goes on on."""
    cdef uint64_t words[IMAGE_CPU_WORDS]
    image_cpu(words)
    return tuple([words[i] for i in range(IMAGE_CPU_WORDS)])


def handed_over():
    """What the launcher gave: arguments and environment (lists of bytes), the program's name, the socket's path and
    descriptor (-1: none), the signals that are ignored (bit 0: signal 1), and whether it holds SIGINT back."""
    environment = []
    cdef char **each = given.environ
    while each[0] != NULL:
        environment.append(<bytes>each[0])
        each += 1
    words = [<bytes>given.argv[i] for i in range(given.argc)]
    return words, environment, <bytes>given.name, <bytes>given.socket, given.fd, given.ignored, bool(given.held)
