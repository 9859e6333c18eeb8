/* SPDX-License-Identifier: Apache-2.0 */
/* A block driver in C with one queue and EVENT_IDX, and the same reads and writes without a device, for comparison.
   Built with -O2 by test_blk.py. */
#define _GNU_SOURCE
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

struct driver {
    uint8_t *desc, *avail, *used;       /* host addresses of rings whose indices are all 0 */
    uint8_t *slots;                     /* host address of 64 + size bytes a request, page aligned: header, status; data */
    uint64_t slots_gpa;
    uint64_t disk;                      /* bytes */
    uint64_t requests;
    uint32_t size;                      /* bytes of data in a request */
    uint32_t depth;
    uint32_t write, sequential;
    int32_t notify, irq;                /* eventfds */
    uint16_t queue_size;
    /* Results: */
    uint64_t kicks, interrupts, failed;
    uint64_t driver_ns;                 /* CPU time of this thread */
};
struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

static uint64_t seed;
static uint64_t random64(void)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed;
}

static uint64_t offset(const struct driver *d, uint64_t n)
{
    uint64_t blocks = d->disk / d->size;
    return (d->sequential ? n % blocks : random64() % blocks) * d->size;
}

static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Returns 0, or -1 if no interrupt came within ten seconds. */
int drive(struct driver *d)
{
    volatile uint16_t *avail_idx = (uint16_t *)(d->avail + 2), *used_idx = (uint16_t *)(d->used + 2);
    uint16_t *ring = (uint16_t *)(d->avail + 4), *used_event = ring + d->queue_size;
    uint32_t *used = (uint32_t *)(d->used + 4);
    volatile uint16_t *avail_event = (uint16_t *)(used + 2 * d->queue_size);
    uint16_t mask = d->queue_size - 1, avail = *avail_idx, seen = *used_idx, old, heads[256];
    uint64_t sent = 0, done = 0, start = cpu_ns(), stride = (d->size + 4096 + 4095) & -4096ull;
    uint32_t i, free_heads = d->depth;
    struct desc *desc = (struct desc *)d->desc;
    seed = 88172645463325252ull;
    for (i = 0; i < d->depth; i++) {
        uint64_t gpa = d->slots_gpa + i * stride;
        uint16_t at = 3 * i;
        uint32_t type = d->write;
        heads[i] = i;
        desc[at] = (struct desc){ gpa, 16, 1, at + 1 };
        desc[at + 1] = (struct desc){ gpa + 4096, d->size, 1 | (d->write ? 0 : 2), at + 2 };
        desc[at + 2] = (struct desc){ gpa + 16, 1, 2, 0 };
        memcpy(d->slots + i * stride, &type, 4);
    }
    while (done < d->requests) {
        old = avail;
        while (free_heads && sent < d->requests) {
            uint64_t sector = offset(d, sent) / 512;
            i = heads[--free_heads];
            memcpy(d->slots + i * stride + 8, &sector, 8);
            d->slots[i * stride + 16] = 0xee;
            ring[avail++ & mask] = 3 * i;
            sent++;
        }
        if (avail != old) {
            __atomic_store_n(avail_idx, avail, __ATOMIC_RELEASE);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            if ((uint16_t)(avail - *avail_event - 1) < (uint16_t)(avail - old)) {
                eventfd_write(d->notify, 1);
                d->kicks++;
            }
        }
        if (__atomic_load_n(used_idx, __ATOMIC_ACQUIRE) == seen) {
            *used_event = seen;
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            if (__atomic_load_n(used_idx, __ATOMIC_ACQUIRE) == seen) {
                struct pollfd p = { d->irq, POLLIN, 0 };
                eventfd_t count;
                if (poll(&p, 1, 10000) != 1)
                    return -1;
                eventfd_read(d->irq, &count);
                d->interrupts++;
            }
        }
        while (seen != __atomic_load_n(used_idx, __ATOMIC_ACQUIRE)) {
            i = used[2 * (seen++ & mask)] / 3;
            d->failed += d->slots[i * stride + 16] != 0;
            heads[free_heads++] = i;
            done++;
        }
    }
    d->driver_ns = cpu_ns() - start;
    return 0;
}

/* Do the same transfers with system calls on this thread. Returns -1 if one failed. */
int bare(struct driver *d, int fd)
{
    uint64_t n, start = cpu_ns();
    seed = 88172645463325252ull;
    for (n = 0; n < d->requests; n++) {
        uint64_t at = offset(d, n);
        ssize_t moved = d->write ? pwrite(fd, d->slots + 4096, d->size, at) : pread(fd, d->slots + 4096, d->size, at);
        if (moved != d->size)
            return -1;
    }
    d->driver_ns = cpu_ns() - start;
    return 0;
}
