// SPDX-License-Identifier: Apache-2.0
/* The launcher's half of a start image (vmm/start_image.h): maps what `pyvmm prepare` saved, and goes on there.

   Every address is the one of the process that was saved, because its memory is full of pointers. Nothing that is
   already mapped is replaced: if a place is taken, this start is an ordinary one. The same holds if a file that was
   mapped or imported has changed, if the CPU has other instructions, and if the kernel is another one. */
#define _GNU_SOURCE
#include "start_image.h"

#include <asm/prctl.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHANGED "has changed since `pyvmm prepare`"

enum { RSEQ_UNREGISTER = 1, KERNEL_SIGSET_BYTES = 8 };
/* A descriptor that no program of today expects; below are those that callers hand over by number. */
enum { HIGH_DESCRIPTOR = 300 };
/* Of Linux 5.11 and 6.7, in case the headers are older. */
enum { FOR_USER_MODE = 1, ASYNCHRONOUS = 1 << 15 };

static bool same_directory(const char *one, const char *other)
{
    struct stat first, second;
    return !stat(one, &first) && !stat(other, &second) && first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

static bool unchanged(const struct image_file *file, const struct stat *now)
{
    return (uint64_t)now->st_size == file->bytes && (uint64_t)now->st_mtim.tv_sec == file->seconds &&
           (uint64_t)now->st_mtim.tv_nsec == file->nanoseconds;
}

/* A descriptor of the file; -1: it is another one now. */
static int open_unchanged(const struct image_file *file, const char *name)
{
    struct stat now;
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (!fstat(fd, &now) && unchanged(file, &now))) return fd;
    close(fd);
    return -1;
}

static bool map(const struct image_segment *segment, int fd)
{
    int flags = MAP_PRIVATE | MAP_FIXED_NOREPLACE | (fd < 0 ? MAP_ANONYMOUS | MAP_NORESERVE : 0);
    void *at = (void *)segment->start;
    /* A kernel before 4.17 takes the address for a hint. */
    if (mmap(at, segment->length, segment->prot, flags, fd, segment->offset) != at) return false;
    return segment->source != IMAGE_WIPED || !madvise(at, segment->length, MADV_WIPEONFORK);
}

/* Have the kernel map only those pages of the image that are touched, not each with its 15 neighbours: a third less
   resident memory, at about 1 us for each page. It does so for memory that a userfaultfd watches, until that is closed. No
   page is ever protected, so nothing is reported. Before Linux 6.7, and where the call is forbidden, nothing changes. */
static void map_touched_alone(const struct image_segment *segment, uint64_t segments)
{
    struct uffdio_api api = {.api = UFFD_API, .features = ASYNCHRONOUS};
    int low = syscall(SYS_userfaultfd, O_CLOEXEC | FOR_USER_MODE);
    int watch = low < 0 ? -1 : fcntl(low, F_DUPFD_CLOEXEC, HIGH_DESCRIPTOR);
    if (low >= 0) close(low);
    if (watch < 0) return;
    bool able = !ioctl(watch, UFFDIO_API, &api);
    for (; able && segments--; segment++) {
        struct uffdio_register of = {{segment->start, segment->length}, .mode = UFFDIO_REGISTER_MODE_WP};
        if (segment->source == IMAGE_ITSELF) able = !ioctl(watch, UFFDIO_REGISTER, &of);
    }
    if (!able) close(watch);
}

/* Move the kernel's vDSO to where the C library of the image calls it. */
static bool move_vdso(const char *base, const struct image_head *head, const struct image_part *parts)
{
    const struct image_part *code = parts + head->parts - 1;
    char *now = (char *)getauxval(AT_SYSINFO_EHDR);
    if (now == NULL || memcmp(now, base + head->vdso, code->length)) return false;
    for (const struct image_part *part = parts; part <= code; part++) {
        void *to = (void *)part->start;
        char *from = now - (code->start - part->start);
        int reserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
        if (mmap(to, part->length, PROT_NONE, reserve, -1, 0) != to) return false;
        if (mremap(from, part->length, part->length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) return false;
    }
    return true;
}

/* From here on there is no way back, no stack protector, whose value is the other thread's, and no C library. */
__attribute__((noreturn, noinline, optimize("no-stack-protector"))) static void enter(const struct image_head *head)
{
    uint64_t frame = head->frame, instruction = head->instruction, stack = head->stack;
    long result = SYS_arch_prctl;
    __asm__ volatile("syscall" : "+a"(result) : "D"(ARCH_SET_FS), "S"(head->thread) : "rcx", "r11", "memory");
    __asm__ volatile("mov %0, %%rbp\n\tmov %1, %%rsp\n\tjmp *%2" ::"c"(frame), "d"(stack), "S"(instruction), "a"(1));
    __builtin_unreachable();
}

const char *start_from_image(const char *path, const char *place, struct image_given *given, const char **what)
{
    struct stat now;
    *what = path;
    int image = open(path, O_RDONLY | O_CLOEXEC);
    if (image < 0) return "there is none; `pyvmm prepare` makes it";
    if (fstat(image, &now) || now.st_size < (off_t)sizeof(struct image_head)) return "is damaged";
    /* Whoever may write it decides what runs here. */
    if ((now.st_uid != 0 && now.st_uid != geteuid()) || now.st_mode & (S_IWGRP | S_IWOTH))
        return "belongs to somebody else, or others may write it";
    const char *base = mmap(NULL, now.st_size, PROT_READ, MAP_PRIVATE, image, 0);
    if (base == MAP_FAILED) return "cannot be mapped";
    const struct image_head *head = (const void *)base;
    if (memcmp(head->magic, IMAGE_MAGIC, sizeof head->magic) || head->bytes != (uint64_t)now.st_size ||
        head->head != sizeof *head)
        return "is damaged, or of another version";

    uint64_t cpu[IMAGE_CPU_WORDS];
    image_cpu(cpu);
    if (memcmp(cpu, head->cpu, sizeof cpu)) return "was made on another CPU";
    *what = base + head->place;
    if (!same_directory(place, *what)) return "is the place of the image's interpreter, not of this one";
    const struct image_segment *segments = (const void *)(head + 1);
    const struct image_part *parts = (const void *)(segments + head->segments);
    const struct image_file *files = (const void *)(parts + head->parts);
    const struct image_descriptor *descriptors = (const void *)(files + head->files);
    uint64_t opened = IMAGE_ZEROS;
    int library = -1;
    for (const struct image_segment *segment = segments; segment < segments + head->segments; segment++) {
        if (segment->source >= IMAGE_FILES && segment->source != opened) { /* a library's follow one another */
            const struct image_file *file = files + segment->source - IMAGE_FILES;
            if (library >= 0) close(library);
            library = open_unchanged(file, *what = base + file->name);
            if (library < 0) return CHANGED;
            opened = segment->source;
        }
        int fd = segment->source >= IMAGE_FILES ? library : segment->source == IMAGE_ITSELF ? image : -1;
        *what = "memory";
        if (!map(segment, fd)) return "is in use where the image has its own";
    }
    if (library >= 0) close(library);
    for (const struct image_file *file = files + head->libraries; file < files + head->files; file++)
        if (stat(*what = base + file->name, &now) || !unchanged(file, &now)) return CHANGED;
    for (const struct image_descriptor *each = descriptors; each < descriptors + head->descriptors; each++) {
        const struct image_file *file = files + each->file;
        int number = each->number, fd = open_unchanged(file, *what = base + file->name);
        if (fd < 0) return CHANGED;
        if (fcntl(number, F_GETFD) >= 0) return "has a descriptor in the image whose number is in use";
        if (dup3(fd, number, O_CLOEXEC) < 0) return "has a descriptor in the image above the limit of open files";
        close(fd);
    }
    map_touched_alone(segments, head->segments);
    *what = "the kernel";
    char *sequence = (char *)__builtin_thread_pointer() + (rseq_bytes() ? __rseq_offset : 0);
    if (rseq_bytes() && syscall(SYS_rseq, sequence, rseq_bytes(), RSEQ_UNREGISTER, RSEQ_SIGNATURE))
        return "does not forget this thread's restartable sequence";
    if (!move_vdso(base, head, parts)) return "is another one than that of `pyvmm prepare`";
    close(image);
    struct image_head last = *head;
    munmap((void *)base, head->bytes);
    sigset_t all;
    sigfillset(&all);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &given->mask, KERNEL_SIGSET_BYTES);
    *(struct image_given **)last.given = given;
    enter(&last);
}
