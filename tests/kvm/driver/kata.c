// SPDX-License-Identifier: Apache-2.0
// A guest that looks like Kata's from outside: block devices, and an agent at port 1024 of the socket device.
// A request is a line with a disk's index. The answer is its current capacity, whether the device has reported a change
// since the last request, and its first word.
#include "virtio.h"

enum {
    BLOCK = 2, SOCKET = 19, RX = 0, TX = 1, HOST = 2, PORT = 1024, CONFIG_CHANGED = 2, DISKS_MAX = 16, BUFFERS = 16,
    REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, ROOM = 65536, SECTOR = 512,
};

struct header {
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, len;
    u16 type, op;
    u32 flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

struct disk {
    struct device device;
    struct queue queue;
};

static struct disk disks[DISKS_MAX];
static struct device sockets;
static struct queue queues[3];
static struct header headers[QUEUE_MAX], answer;
static u8 buffers[QUEUE_MAX][ROOM / 16], text[128], sector[SECTOR];
static u64 cid, count;         // of disks
static u32 received, length;    // of the one connection at a time

static void post(void)
{
    u16 head = queues[RX].free;
    struct part parts[] = {{&headers[head], sizeof *headers}, {buffers[head], sizeof *buffers}};
    expect(add(&queues[RX], parts, 0, 2) == head);
}

static void say(const struct header *to, u16 op, u32 len)
{
    answer = (struct header){cid, to->src_cid, to->dst_port, to->src_port, len, 1, op, 0, ROOM, received};
    struct part parts[] = {{&answer, sizeof answer}, {text, len}};
    add(&queues[TX], parts, len ? 2 : 1, 0);
    kick(&queues[TX]);
    wait(&queues[TX], NULL);
}

static void put(const char *word)
{
    for (; *word; word++)
        text[length++] = *word;
}

static void put_number(u64 value)
{
    char digits[24], *at = digits + sizeof digits - 1;
    *at = 0;
    do
        *--at = '0' + value % 10;
    while (value /= 10);
    put(at);
}

static u64 first_word(struct disk *disk)
{
    struct { u32 type, reserved; u64 sector; } request = {0};
    u8 status = 0xff;
    struct part parts[] = {{&request, sizeof request}, {sector, SECTOR}, {&status, 1}};
    add(&disk->queue, parts, 1, 2);
    kick(&disk->queue);
    wait(&disk->queue, NULL);
    return status ? 0 : *(u64 *)sector;
}

static void tell(struct disk *disk)
{
    u64 base = disk->device.base, changed = read32(base + INTERRUPT_STATUS) & CONFIG_CHANGED;
    u64 capacity = read32(base + CONFIG) | (u64)read32(base + CONFIG + 4) << 32;
    write32(base + INTERRUPT_ACK, changed);
    length = 0;
    put("capacity=");
    put_number(capacity);
    put(" changed=");
    put_number(!!changed);
    put(" word=");
    put_number(capacity ? first_word(disk) : 0);
    put("\n");
}

static void receive(const struct header *from, const u8 *data)
{
    expect(from->src_cid == HOST && from->dst_cid == cid && from->dst_port == PORT);
    switch (from->op) {
    case REQUEST:
        received = 0;
        say(from, RESPONSE, 0);
        break;
    case RW:
        received += from->len;
        u64 index = DISKS_MAX;
        if (from->len)
            number((const char *)data, &index);
        if (index < count) {
            tell(&disks[index]);
            say(from, RW, length);
        }
        break;
    case SHUTDOWN: say(from, RST, 0); break;
    case CREDIT_REQUEST: say(from, CREDIT_UPDATE, 0); break;
    }
}

int main(void)
{
    u64 base;
    for (const char *at = cmdline; (at = find(at, "virtio_mmio.device="));) {
        number(find(at, "@"), &base);
        count += read32(base + DEVICE_ID) == BLOCK;
    }
    expect(count <= DISKS_MAX);
    for (u64 i = 0; i < count; i++) {
        disks[i].device = find_device(BLOCK, i);
        negotiate(&disks[i].device, 0, 0);
        set_up(&disks[i].queue, &disks[i].device, 0, 16);
        driver_ok(&disks[i].device);
    }
    sockets = find_device(SOCKET, 0);
    negotiate(&sockets, 0, 0);
    for (int i = 0; i < 3; i++)
        set_up(&queues[i], &sockets, i, QUEUE_MAX);
    driver_ok(&sockets);
    cid = read32(sockets.base + CONFIG) | (u64)read32(sockets.base + CONFIG + 4) << 32;
    for (int i = 0; i < BUFFERS; i++)
        post();
    kick(&queues[RX]);
    report("listening", PORT);
    for (;;) {
        int head = wait(&queues[RX], NULL);
        receive(&headers[head], buffers[head]);
        post();
        kick(&queues[RX]);
    }
}
