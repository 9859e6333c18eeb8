/* SPDX-License-Identifier: Apache-2.0 */
/* The peer of queue_cycle.pyx: plain C that serves the same ring with the same checks. It is a single file, so that the
   compiler can inline everything. Built with -O2 by test_queue_cycle.py. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

struct ring {
    uint8_t *desc, *avail, *used;       /* host addresses */
    uint16_t size, last_avail, used_idx;
    uint64_t ram_gpa, ram_size;
    uint8_t *ram;
    struct iovec *iov;
};
struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

static uint8_t *host(const struct ring *r, uint64_t gpa, uint64_t size)
{
    uint64_t offset = gpa - r->ram_gpa;
    if (gpa < r->ram_gpa || offset > r->ram_size || size > r->ram_size - offset)
        return NULL;
    return r->ram + offset;
}

static int pop(struct ring *r, uint16_t *head, uint32_t *readable, uint32_t *writable)
{
    uint16_t ahead = __atomic_load_n((uint16_t *)(r->avail + 2), __ATOMIC_ACQUIRE) - r->last_avail;
    uint32_t table_size = r->size, seen = 0, in = 0, out = 0;
    uint64_t total = 0;
    uint8_t *table = r->desc;
    uint16_t index;
    int indirect = 0;
    if (!ahead)
        return 0;
    if (ahead > r->size)
        return -1;
    index = __atomic_load_n((uint16_t *)(r->avail + 4) + (r->last_avail & (r->size - 1)), __ATOMIC_RELAXED);
    if (index >= r->size)
        return -1;
    *head = index;
    for (;;) {
        struct desc d;
        uint8_t *at;
        memcpy(&d, table + 16 * (size_t)index, 16);
        __asm__ __volatile__("" : : : "memory");
        if (d.flags & 4) {
            if (indirect || d.flags & 1 || !d.len || d.len & 15 || d.len / 16 > r->size)
                return -1;
            table = host(r, d.addr, d.len);
            if (!table)
                return -1;
            table_size = d.len / 16;
            indirect = 1;
            index = 0;
            continue;
        }
        if (++seen > r->size)
            return -1;
        at = host(r, d.addr, d.len);
        if (!at)
            return -1;
        total += d.len;
        if (total > 1ull << 32 || (!(d.flags & 2) && in))
            return -1;
        if (d.len) {
            r->iov[in + out] = (struct iovec){ at, d.len };
            if (d.flags & 2)
                in++;
            else
                out++;
        }
        if (!(d.flags & 1))
            break;
        index = d.next;
        if (index >= table_size)
            return -1;
    }
    *readable = out;
    *writable = in;
    r->last_avail++;
    return 1;
}

static int add_used(struct ring *r, uint32_t head, uint32_t written)
{
    uint32_t *element = (uint32_t *)(r->used + 4) + 2 * (size_t)(r->used_idx & (r->size - 1));
    uint16_t old = r->used_idx, event;
    element[0] = head;
    element[1] = written;
    r->used_idx++;
    __atomic_store_n((uint16_t *)(r->used + 2), r->used_idx, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    event = __atomic_load_n((uint16_t *)(r->avail + 4) + r->size, __ATOMIC_RELAXED);
    return (uint16_t)(r->used_idx - event - 1) < (uint16_t)(r->used_idx - old);
}

uint32_t cycle(struct ring *r, uint32_t rounds)
{
    uint32_t served = 0, interrupts = 0, in, out;
    uint16_t head;
    while (rounds--) {
        *(volatile uint16_t *)(r->avail + 2) += r->size;
        while (pop(r, &head, &out, &in) == 1) {
            interrupts += add_used(r, head, 1);
            served++;
        }
    }
    __asm__ __volatile__("" : : "r"(interrupts));
    return served;
}
