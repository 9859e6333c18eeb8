// SPDX-License-Identifier: Apache-2.0
// A driver for block devices. test=N on the command line selects a test.
#include "virtio.h"

enum { BLOCK = 2, IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, PAGE = 4096, SECTORS = PAGE / 512, DEPTH_MAX = 128 };

struct request {
    struct { u32 type, reserved; u64 sector; } header;
    u64 page;
    u8 status;
};

struct disk {
    struct device device;
    struct queue queue;
    struct request requests[QUEUE_MAX];
    u8 (*slots)[PAGE];      // a page for each head
    u64 pages;
};

static u8 memory[2][QUEUE_MAX][PAGE] __attribute__((aligned(PAGE)));
static struct disk disks[2];

static u64 pattern(u64 page, u64 word) { return (page * 512 + word + 1) * 0x9e3779b97f4a7c15; }

static void bring_up(struct disk *disk, int index)
{
    disk->device = find_device(BLOCK, index);
    disk->slots = memory[index];
    negotiate(&disk->device, (option("event_idx=", 1) ? EVENT_IDX : 0) | (option("indirect=", 1) ? INDIRECT_DESC : 0), 0);
    set_up(&disk->queue, &disk->device, option("queue=", 0), option("size=", QUEUE_MAX));
    driver_ok(&disk->device);
    disk->pages = (read32(disk->device.base + CONFIG) | (u64)read32(disk->device.base + CONFIG + 4) << 32) / SECTORS;
}

// The head that the queue will return next, so that the caller can fill its page before.
static void submit(struct disk *disk, u32 type, u64 page, u32 len)
{
    u16 head = disk->queue.free;
    struct request *request = &disk->requests[head];
    *request = (struct request){{type, 0, page * SECTORS}, page, 0xff};
    if (type == OUT)
        for (int word = 0; word < PAGE / 8; word++)
            ((u64 *)disk->slots[head])[word] = pattern(page, word);
    struct part parts[] = {{&request->header, 16}, {disk->slots[head], len}, {&request->status, 1}};
    if (type == FLUSH)
        parts[1] = parts[2];
    int in = type == FLUSH || type == OUT ? 1 : 2, out = type == OUT ? 2 : 1;
    expect(add(&disk->queue, parts, out, in) == head);
}

static int complete(struct disk *disk)
{
    u32 written;
    int head = wait(&disk->queue, &written);
    u32 type = disk->requests[head].header.type;
    expect(disk->requests[head].status == 0);
    expect(written == (type == IN ? PAGE + 1 : type == GET_ID ? 21 : 1));
    return head;
}

static void verify(struct disk *disk, int head)
{
    for (int word = 0; word < PAGE / 8; word++)
        expect(((u64 *)disk->slots[head])[word] == pattern(disk->requests[head].page, word));
}

// Make `count` requests of one page each, at the pages next(i), with `depth` of them in flight.
static void run(struct disk *disk, u32 type, u64 count, int depth, u64 (*next)(struct disk *, u64), bool check)
{
    u64 submitted = 0, completed = 0;
    while (completed < count) {
        bool added = false;
        for (; submitted < count && submitted - completed < depth; submitted++, added = true)
            submit(disk, type, next(disk, submitted), PAGE);
        if (added)
            kick(&disk->queue);
        do {
            int head = complete(disk);
            if (check)
                verify(disk, head);
            completed++;
        } while (*(volatile u16 *)&disk->queue.used.idx != disk->queue.seen);
    }
}

static u64 in_order(struct disk *disk, u64 i) { return i % disk->pages; }
static u64 scattered(struct disk *disk, u64 i) { return i * 7919 % disk->pages; }

static u64 at_random(struct disk *disk, u64 i)
{
    static u64 state = 88172645463325252;
    (void)i;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % disk->pages;
}

// Write every page, flush, and read all pages in another order.
static void write_and_read_back(struct disk *disk)
{
    int depth = option("depth=", 32);
    run(disk, OUT, disk->pages, depth, in_order, false);
    submit(disk, FLUSH, 0, 0);
    kick(&disk->queue);
    complete(disk);
    run(disk, IN, disk->pages, depth, scattered, true);
    submit(disk, GET_ID, 0, 20);
    kick(&disk->queue);
    print("id=");
    print((char *)disk->slots[complete(disk)]);
    print("\n");
}

// Each request that asks for an interrupt gets exactly one.
static void interrupted(struct disk *disk)
{
    route(disk->device.gsi, 3);
    want_interrupts(&disk->queue, true);
    for (u32 i = 0; i < 20; i++) {
        u32 before = interrupts[3];
        submit(disk, OUT, i, PAGE);
        kick(&disk->queue);
        while (interrupts[3] == before)
            relax();
        expect(read32(disk->device.base + INTERRUPT_STATUS) == 1);
        write32(disk->device.base + INTERRUPT_ACK, 1);
        expect(poll(&disk->queue, NULL) >= 0);
    }
    report("interrupts", interrupts[3]);
    want_interrupts(&disk->queue, false);
    run(disk, IN, 20, 1, in_order, true);
    report("while polled", interrupts[3]);
}

// Invalid rings, each of which stops the device. Only the status register shows it: no request completes.
static void lie(struct disk *disk, int kind)
{
    struct queue *queue = &disk->queue;
    static struct desc loop[2] = {{0x200000, 512, NEXT, 1}, {0x200000, 512, NEXT, 0}};
    queue->avail.ring[0] = 0;
    queue->desc[0] = (struct desc){0x200000, 512, 0, 0};
    switch (kind) {
    case 0: queue->avail.ring[0] = 9999; break;                                                   // no such descriptor
    case 1: queue->desc[0].flags = NEXT; break;                                                    // a loop
    case 2: queue->desc[0].at = ~0ull - 100; break;                                                // past all memory
    case 3: queue->added = queue->size + 100; break;                                               // more than there are
    case 4: queue->desc[0] = (struct desc){(u64)loop, sizeof loop, INDIRECT, 0}; break;            // a loop in a table
    case 5: queue->desc[0] = (struct desc){~0ull << 12, sizeof loop, INDIRECT, 0}; break;          // a table nowhere
    case 6: queue->desc[0] = (struct desc){0x200000, 512, NEXT, 60000}; break;                     // a link out of it
    case 7: queue->desc[0].at = 0xc0000000; break;                                                 // no RAM there
    }
    queue->added += kind != 3;
    kick(queue);
}

// The first disk's driver adds invalid chains all the time. All requests of the second disk are correct, and as fast as
// without.
static void liar(void)
{
    struct disk *good = &disks[1];
    u64 rounds = option("rounds=", 8), count = option("count=", 64);
    int depth = option("depth=", 32);
    bring_up(&disks[0], 0);
    bring_up(good, 1);
    run(good, OUT, good->pages, depth, in_order, false);
    for (u64 round = 0; round < 2 * rounds; round++) {
        bool lying = round & 1;
        bring_up(&disks[0], 0);
        u64 from = ticks();
        if (lying)
            lie(&disks[0], round / 2 % 8);
        for (int part = 0; part < 10; part++) {
            write32(disks[0].device.base + QUEUE_NOTIFY, 0);
            run(good, IN, count / 10, depth, at_random, true);
        }
        report(lying ? "lying" : "quiet", ticks() - from);
        while (lying && !(read32(disks[0].device.base + STATUS) & NEEDS_RESET))
            relax();
    }
    bring_up(&disks[0], 0);     // and a reset mends it
    run(&disks[0], OUT, 64, depth, in_order, false);
    run(&disks[0], IN, 64, depth, in_order, true);
}

static void measure(struct disk *disk)
{
    u32 type = option("write=", 0) ? OUT : IN;
    u64 count = option("count=", 1000), depth = option("depth=", 1), rounds = option("rounds=", 1);
    run(disk, type, count < 1000 ? count : 1000, depth, at_random, false);
    while (rounds--) {
        u64 kicks = disk->queue.kicks, from = ticks();
        run(disk, type, count, depth, at_random, false);
        report("ticks", ticks() - from);
        report("kicks", disk->queue.kicks - kicks);
    }
}

int main(void)
{
    u64 test = option("test=", 0);
    if (test == 2) {
        liar();
        return 0;
    }
    bring_up(&disks[0], 0);
    if (test == 0)
        write_and_read_back(&disks[0]);
    else if (test == 1)
        interrupted(&disks[0]);
    else
        measure(&disks[0]);
    return 0;
}
