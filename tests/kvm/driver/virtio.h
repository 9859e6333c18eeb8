// SPDX-License-Identifier: Apache-2.0
// What a driver in ring 3 needs: output, ports, interrupts, and virtio-mmio with split queues, which are polled.
// Source: OASIS Virtual I/O Device (VIRTIO) Version 1.2, sections 2.7 and 4.2; Intel SDM volume 3, chapter 11 (APIC).
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define expect(truth) ((truth) ? (void)0 : fail(__FILE__, __LINE__, #truth))
#define barrier() __asm__ volatile("" ::: "memory")    // x86 keeps loads in order, and stores in order
#define full_barrier() __asm__ volatile("mfence" ::: "memory")

int main(void);

volatile u32 interrupts[16];    // by vector - 0x20; start.S counts
static const char *cmdline;

// The compiler generates calls of these.
void *memcpy(void *to, const void *from, size_t n)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) :: "memory");
    return start;
}

void *memset(void *at, int value, size_t n)
{
    void *start = at;
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(value) : "memory");
    return start;
}

static void relax(void) { __asm__ volatile("pause" ::: "memory"); }

// Output on the serial port. The end of a line flushes it.

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" :: "a"(value), "Nd"(port)); }

static void print(const char *text)
{
    for (; *text; text++)
        out8(0x3f8, *text);
}

static void print_number(u64 value, int base)
{
    char digits[24], *at = digits + sizeof digits - 1;
    *at = 0;
    do
        *--at = "0123456789abcdef"[value % base];
    while (value /= base);
    print(at);
}

static void report(const char *name, u64 value)
{
    print(name);
    print("=");
    print_number(value, 10);
    print("\n");
}

// End the VM by the exit port. QEMU's isa-debug-exit makes 2n+1 of n; Firecracker has only the keyboard's reset line.
static __attribute__((noreturn)) void end(u8 status)
{
    report("exit", status);
    out8(0xf4, status);
    out8(0x64, 0xfe);
    for (;;)
        relax();
}

static __attribute__((noreturn, unused)) void fail(const char *file, int line, const char *what)
{
    print(file);
    print(":");
    print_number(line, 10);
    print(": ");
    print(what);
    print("\n");
    end(1);
}

void exception(const u64 *frame, u64 address)   // in ring 0; frame: vector, error code, rip, ...
{
    report("exception", frame[0]);
    report("error", frame[1]);
    print("rip=");
    print_number(frame[2], 16);
    print(" address=");
    print_number(address, 16);
    print("\n");
    end(2);
}

void start(const char *words)
{
    cmdline = words;
    end(main());
}

static const char *find(const char *text, const char *word)
{
    for (; *text; text++) {
        size_t n = 0;
        while (word[n] && text[n] == word[n])
            n++;
        if (!word[n])
            return text + n;
    }
    return NULL;
}

static const char *number(const char *text, u64 *value)
{
    int base = text[0] == '0' && text[1] == 'x' ? 16 : 10;
    text += base == 16 ? 2 : 0;
    for (*value = 0;; text++) {
        int digit = *text >= 'a' ? *text - 'a' + 10 : *text <= '9' ? *text - '0' : -1;
        if (digit < 0 || digit >= base)
            return text;
        *value = *value * base + digit;
    }
}

// The number of NAME=NUMBER on the command line; `name` includes the =.
static u64 option(const char *name, u64 otherwise)
{
    const char *at = find(cmdline, name);
    if (at)
        number(at, &otherwise);
    return otherwise;
}

static u64 ticks(void)
{
    u32 low, high;
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high) :: "memory");
    return (u64)high << 32 | low;
}

static u32 read32(u64 at)
{
    u32 value;
    __asm__ volatile("movl %1, %0" : "=r"(value) : "m"(*(volatile u32 *)at) : "memory");
    return value;
}

static void write32(u64 at, u32 value)
{
    __asm__ volatile("movl %1, %0" : "=m"(*(volatile u32 *)at) : "r"(value) : "memory");
}

// A device, found by virtio_mmio.device=SIZE@BASE:GSI on the kernel's command line.

enum {
    MAGIC = 0, VERSION = 4, DEVICE_ID = 8, DEVICE_FEATURES = 0x10, DEVICE_FEATURES_SEL = 0x14, DRIVER_FEATURES = 0x20,
    DRIVER_FEATURES_SEL = 0x24, QUEUE_SEL = 0x30, QUEUE_NUM_MAX = 0x34, QUEUE_NUM = 0x38, QUEUE_READY = 0x44,
    QUEUE_NOTIFY = 0x50, INTERRUPT_STATUS = 0x60, INTERRUPT_ACK = 0x64, STATUS = 0x70, QUEUE_DESC = 0x80,
    QUEUE_DRIVER = 0x90, QUEUE_DEVICE = 0xa0, SHM_SEL = 0xac, SHM_LEN = 0xb0, SHM_BASE = 0xb8, CONFIG = 0x100,
    ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64,
};
#define INDIRECT_DESC (1ull << 28)
#define EVENT_IDX (1ull << 29)
#define VERSION_1 (1ull << 32)

struct device {
    u64 base, features;
    u32 gsi;
};

// The device of that type with that index, from 0.
static struct device find_device(u32 type, int index)
{
    struct device device = {0};
    const char *at = cmdline;
    while ((at = find(at, "virtio_mmio.device="))) {
        u64 gsi = 0;
        at = find(at, "@");
        at = number(at, &device.base);
        number(at + 1, &gsi);
        device.gsi = gsi;
        if (read32(device.base) == 0x74726976 && read32(device.base + VERSION) == 2
            && read32(device.base + DEVICE_ID) == type && index-- == 0)
            return device;
    }
    fail(__FILE__, __LINE__, "no such device");
}

// Initialize up to FEATURES_OK (3.1.1). Accepts the offered ones of `features`, which must include all of `must`.
static void negotiate(struct device *device, u64 features, u64 must)
{
    u64 base = device->base, offered;
    write32(base + STATUS, 0);
    while (read32(base + STATUS))
        relax();
    write32(base + STATUS, ACKNOWLEDGE);
    write32(base + STATUS, ACKNOWLEDGE | DRIVER);
    write32(base + DEVICE_FEATURES_SEL, 1);
    offered = (u64)read32(base + DEVICE_FEATURES) << 32;
    write32(base + DEVICE_FEATURES_SEL, 0);
    offered |= read32(base + DEVICE_FEATURES);
    device->features = offered & (features | must | VERSION_1);
    expect((device->features & must) == must);
    for (int half = 0; half < 2; half++) {
        write32(base + DRIVER_FEATURES_SEL, half);
        write32(base + DRIVER_FEATURES, device->features >> 32 * half);
    }
    write32(base + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    expect(read32(base + STATUS) & FEATURES_OK);
}

static void driver_ok(struct device *device)
{
    write32(device->base + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    expect(read32(device->base + STATUS) == (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK));
}

// A split queue. The caller stores its data about a chain by the chain's head, which is below `size`.

enum { QUEUE_MAX = 256, PARTS_MAX = 8, NEXT = 1, WRITE = 2, INDIRECT = 4 };

struct desc {
    u64 at;
    u32 len;
    u16 flags, next;
};

struct part {
    void *at;
    u32 len;
};

struct queue {
    struct desc desc[QUEUE_MAX] __attribute__((aligned(4096)));
    struct { u16 flags, idx, ring[QUEUE_MAX], used_event; } avail __attribute__((aligned(4096)));
    struct { u16 flags, idx; struct { u32 id, len; } ring[QUEUE_MAX]; u16 avail_event; } used
        __attribute__((aligned(4096)));
    struct desc tables[QUEUE_MAX][PARTS_MAX];
    struct device *device;
    u16 index, size, free, free_count, added, seen, told;
    bool interrupts;
    u64 kicks;
};

static u16 *used_event(struct queue *queue) { return &queue->avail.ring[queue->size]; }
static u16 *avail_event(struct queue *queue) { return (u16 *)&queue->used.ring[queue->size]; }

// Without interrupts, used_event is far ahead. At the chain just seen, the device might still read it and interrupt.
static void set_used_event(struct queue *queue)
{
    *(volatile u16 *)used_event(queue) = queue->interrupts ? queue->seen : queue->seen + 0x8000;
}

// Ask for an interrupt at the next used chain, or for no interrupts.
static void want_interrupts(struct queue *queue, bool wanted)
{
    queue->interrupts = wanted;
    queue->avail.flags = !wanted && !(queue->device->features & EVENT_IDX);
    set_used_event(queue);
    full_barrier();
}

// Call it between negotiate() and driver_ok(). `queue` is zeroed, and polled.
static void set_up(struct queue *queue, struct device *device, u16 index, u16 size)
{
    u64 base = device->base, parts[] = {(u64)queue->desc, (u64)&queue->avail, (u64)&queue->used};
    memset(queue, 0, sizeof *queue);
    queue->device = device;
    queue->index = index;
    write32(base + QUEUE_SEL, index);
    u32 most = read32(base + QUEUE_NUM_MAX);
    expect(most > 0 && size <= QUEUE_MAX);
    queue->size = queue->free_count = size <= most ? size : most;
    for (u16 i = 0; i < queue->size; i++)
        queue->desc[i].next = i + 1;
    want_interrupts(queue, false);
    write32(base + QUEUE_NUM, queue->size);
    for (int i = 0; i < 3; i++) {
        write32(base + QUEUE_DESC + 16 * i, parts[i]);
        write32(base + QUEUE_DESC + 16 * i + 4, parts[i] >> 32);
    }
    write32(base + QUEUE_READY, 1);
    expect(read32(base + QUEUE_READY) == 1);
}

// Add a chain of `out` buffers that the device reads and `in` buffers that it writes. Returns its head; -1: no room.
static int add(struct queue *queue, const struct part *parts, int out, int in)
{
    int count = out + in;
    bool indirect = queue->device->features & INDIRECT_DESC && count > 1;
    if (queue->free_count < (indirect ? 1 : count))
        return -1;
    u16 head = queue->free, at = head, last = head;
    struct desc *table = indirect ? queue->tables[head] : queue->desc;
    for (int i = 0; i < count; i++) {
        u16 slot = indirect ? i : at, next = indirect ? i + 1 : queue->desc[at].next;
        table[slot] = (struct desc){(u64)parts[i].at, parts[i].len,
                                     (i >= out ? WRITE : 0) | (i + 1 < count ? NEXT : 0), next};
        last = slot;
        at = next;
    }
    if (indirect) {
        at = queue->desc[head].next;
        queue->desc[head] = (struct desc){(u64)table, count * sizeof *table, INDIRECT, at};
    } else {
        at = queue->desc[last].next;
    }
    queue->free = at;
    queue->free_count -= indirect ? 1 : count;
    queue->avail.ring[queue->added++ & (queue->size - 1)] = head;
    return head;
}

// Make the added chains available, and notify the device if it asks for that (2.7.13).
static void kick(struct queue *queue)
{
    barrier();
    *(volatile u16 *)&queue->avail.idx = queue->added;
    full_barrier();
    bool wanted = !*(volatile u16 *)&queue->used.flags;
    if (queue->device->features & EVENT_IDX) {
        u16 event = *(volatile u16 *)avail_event(queue);
        wanted = (u16)(queue->added - event - 1) < (u16)(queue->added - queue->told);
    }
    queue->told = queue->added;
    if (wanted) {
        queue->kicks++;
        write32(queue->device->base + QUEUE_NOTIFY, queue->index);
    }
}

// Take the next used chain. Returns its head, which is free again, and sets the number of bytes written; -1: none yet.
static int poll(struct queue *queue, u32 *written)
{
    if (*(volatile u16 *)&queue->used.idx == queue->seen)
        return -1;
    barrier();
    u32 head = queue->used.ring[queue->seen & (queue->size - 1)].id;
    if (written)
        *written = queue->used.ring[queue->seen & (queue->size - 1)].len;
    queue->seen++;
    set_used_event(queue);
    expect(head < queue->size);
    u16 last = head;
    queue->free_count++;
    for (; queue->desc[last].flags & NEXT; last = queue->desc[last].next)
        queue->free_count++;
    queue->desc[last].next = queue->free;
    queue->free = head;
    return head;
}

static int wait(struct queue *queue, u32 *written)
{
    int head;
    while ((head = poll(queue, written)) < 0)
        relax();
    return head;
}

// Route `gsi` here: each edge counts in interrupts[line].
static void route(u32 gsi, int line)
{
    const u64 ioapic = 0xfec00000, lapic = 0xfee00000;
    write32(lapic + 0xf0, 0x12f);       // enabled; the spurious vector
    write32(ioapic, 0x11 + 2 * gsi);
    write32(ioapic + 0x10, read32(lapic + 0x20) & 0xff000000);
    write32(ioapic, 0x10 + 2 * gsi);
    write32(ioapic + 0x10, 0x20 + line);
}
