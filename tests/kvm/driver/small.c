// SPDX-License-Identifier: Apache-2.0
// Drivers for the entropy device (test=0) and the balloon (test=1).
#include "virtio.h"

enum { ENTROPY = 4, BALLOON = 5, PAGE = 4096, PAGES = 512, MUST_TELL_HOST = 1, DEFLATE_ON_OOM = 4, REPORTING = 32 };

static struct device device;
static struct queue queues[3];
static u64 pages[PAGES][PAGE / 8] __attribute__((aligned(2 << 20)));
static u32 numbers[PAGES];

static void request(struct queue *queue, void *at, u32 len, bool written_to)
{
    struct part part = {at, len};
    expect(add(queue, &part, !written_to, written_to) >= 0);
    kick(queue);
    expect(wait(queue, NULL) >= 0);
}

// The data is as long as the device says, and no two words are equal.
static void entropy(void)
{
    device = find_device(ENTROPY, 0);
    negotiate(&device, EVENT_IDX | INDIRECT_DESC, 0);
    set_up(&queues[0], &device, 0, 64);
    driver_ok(&device);
    u64 total = 0, words = 0;
    u8 *at = (u8 *)pages;
    for (int i = 0; i < 32; i++) {
        struct part parts[] = {{at + total, 100}, {at + total + 100, 28}};
        u32 written;
        add(&queues[0], parts, 0, 2);
        kick(&queues[0]);
        wait(&queues[0], &written);
        expect(written > 0 && written <= 128);
        total += written;
    }
    for (words = 0; words < total / 8; words++)
        for (u64 other = 0; other < words; other++)
            expect(pages[0][words] != pages[0][other]);
    expect(((u64 *)(at + total))[1] == 0);      // nothing behind the end
    report("bytes", total);
}

static void fill(void)
{
    for (u64 i = 0; i < PAGES; i++)
        for (int word = 0; word < PAGE / 8; word++)
            pages[i][word] = ~i;
}

// Pages in the balloon, or reported free, are zeros afterwards: the host has taken them and provides new ones.
static void balloon(void)
{
    device = find_device(BALLOON, 0);
    negotiate(&device, EVENT_IDX | INDIRECT_DESC | MUST_TELL_HOST | DEFLATE_ON_OOM | REPORTING, REPORTING);
    for (int i = 0; i < 3; i++)
        set_up(&queues[i], &device, i, 64);
    driver_ok(&device);
    u32 wanted = read32(device.base + CONFIG);
    report("wanted", wanted);
    expect(wanted <= PAGES);
    fill();
    for (u32 i = 0; i < wanted; i++)
        numbers[i] = ((u64)pages[i]) / PAGE;
    request(&queues[0], numbers, wanted * sizeof *numbers, false);
    write32(device.base + CONFIG + 4, wanted);
    expect(read32(device.base + CONFIG + 4) == wanted);
    for (u32 i = 0; i < PAGES; i++)
        expect(pages[i][0] == (i < wanted ? 0 : ~(u64)i) && pages[i][511] == pages[i][0]);
    request(&queues[1], numbers, wanted * sizeof *numbers, false);
    write32(device.base + CONFIG + 4, 0);
    fill();
    request(&queues[2], pages, 64 * PAGE, true);
    for (u32 i = 0; i < PAGES; i++)
        expect(pages[i][0] == (i < 64 ? 0 : ~(u64)i) && pages[i][511] == pages[i][0]);
}

int main(void)
{
    if (option("test=", 0))
        balloon();
    else
        entropy();
    return 0;
}
