// SPDX-License-Identifier: Apache-2.0
/* A start image: the memory of an interpreter that has imported pyvmm, as a file. `pyvmm prepare` makes it, of a process
   that stands still in vmm/_start_image.pyx. The launcher maps it (vmm/start_image.c) and goes on there, in its own
   process: with its own pid, parent, descriptors, cgroup, limits and signal mask.

   The file begins with `struct image_head`; behind it are the segments, the parts of the vDSO, the files, the
   descriptors, and the files' names. Then comes the memory. Numbers are 64 bits wide, in the order in which
   vmm/commands/prepare.py packs them. */
#ifndef VMM_START_IMAGE_H
#define VMM_START_IMAGE_H

#include <cpuid.h>
#include <stddef.h>
#include <stdint.h>

#define IMAGE_MAGIC "pyvmmSI1"
/* Of glibc 2.35 and newer: where a thread's restartable sequence is, and what the kernel is told of it. */
extern const ptrdiff_t __rseq_offset __attribute__((weak));
extern const unsigned int __rseq_size __attribute__((weak));
enum { RSEQ_LEAST = 32, RSEQ_SIGNATURE = 0x53053053 };

/* IMAGE_WIPED: zeros, and in each child of fork() zeros again, as the C library wants its random numbers' state. */
enum { IMAGE_CPU_WORDS = 3, IMAGE_ZEROS = 0, IMAGE_ITSELF = 1, IMAGE_WIPED = 2, IMAGE_FILES = 3 };

struct image_head {
    char magic[8];
    uint64_t bytes;       /* of the whole file */
    uint64_t head;        /* bytes of this structure: another pyvmm's may have another one */
    uint64_t segments, parts, files, descriptors;
    uint64_t libraries;   /* how many of the files, the first ones, are mapped */
    uint64_t place;       /* offset of the name of the interpreter's directory */
    uint64_t vdso;        /* offset of a copy of the vDSO's code, the last of the parts */
    uint64_t cpu[IMAGE_CPU_WORDS];
    uint64_t thread;      /* base of the FS segment */
    uint64_t given;       /* address of a pointer to `struct image_given` */
    uint64_t frame, instruction, stack; /* where the process stands still: RBP, RIP, RSP */
};

struct image_segment { uint64_t start, length, prot, source, offset; };
struct image_part { uint64_t start, length; };
struct image_file { uint64_t bytes, seconds, nanoseconds, name; };
struct image_descriptor { uint64_t number, file; }; /* a library's own, to map more of a file */

/* What the launcher hands to the interpreter. It stays the launcher's memory, for as long as the process runs. */
struct image_given {
    int argc;
    char **argv, **environ;
    const char *name;     /* that the program was started by */
    const char *socket;   /* the path of the listening socket */
    int fd;               /* the socket, or -1 */
    uint64_t mask;        /* blocked signals */
    uint64_t ignored;     /* signals that were ignored at the start */
    int held;             /* SIGINT is blocked by the launcher alone */
};

/* How many bytes of it the kernel was told of, as a call that takes it back must repeat; 0: there is none. */
static inline unsigned int rseq_bytes(void)
{
    if (&__rseq_size == NULL || !__rseq_size) return 0;
    return __rseq_size < RSEQ_LEAST ? RSEQ_LEAST : __rseq_size;
}

/* What the C library chose its functions by. It differs between two CPUs only if their instructions do. */
static inline void image_cpu(uint64_t words[IMAGE_CPU_WORDS])
{
    unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
    __cpuid(1, a, b, c, d);
    words[0] = d | (uint64_t)c << 32;
    if (c & bit_OSXSAVE) __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    words[1] = low | (uint64_t)high << 32;
    __cpuid_count(7, 0, a, b, c, d);
    words[2] = (b | (uint64_t)c << 32) ^ (uint64_t)(d & ~(1u << 15)) << 16; /* bit 15: not all cores are of one kind */
}

/* Go on from the image `path`, for an interpreter in the directory `place`. Returns why that is not possible, with
   nothing changed that an execve does not undo; what it could not find is in `what`. */
const char *start_from_image(const char *path, const char *place, struct image_given *given, const char **what);

#endif
