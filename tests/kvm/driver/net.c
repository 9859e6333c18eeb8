// SPDX-License-Identifier: Apache-2.0
// A driver for the network device, at 10.99.0.2. test= selects one of these:
//   0: answer ARP and pings until a UDP datagram arrives at port 9
//   1: send count= datagrams of 64 bytes to port 7 of 10.99.0.1 in each round
//   2: receive count= datagrams
//   3: ping 10.99.0.1 count= times, one after the other
#include "virtio.h"

enum { NETWORK = 1, RX = 0, TX = 1, HEADER = 12, BUFFERS = 256, FRAME = 2048 - HEADER };
#define MAC (1ull << 5)
#define MRG_RXBUF (1ull << 15)

// Frames as on the wire; numbers are big-endian
struct ethernet { u8 to[6], from[6]; u16 type; } __attribute__((packed));
struct arp { struct ethernet ethernet; u8 kinds[6]; u16 op; u8 from_mac[6]; u32 from; u8 to_mac[6]; u32 to; }
    __attribute__((packed));
struct ip {
    struct ethernet ethernet;
    u8 version, service;
    u16 len, id, fragment;
    u8 ttl, protocol;
    u16 checksum;
    u32 from, to;
    union {
        struct { u8 type, code; u16 checksum; } icmp;
        struct { u16 from, to, len, checksum; } udp;
    };
} __attribute__((packed));
struct buffer { u8 header[HEADER]; union { u8 frame[FRAME]; struct ethernet ethernet; struct arp arp; struct ip ip; }; };

static struct device device;
static struct queue queues[2];
static struct buffer buffers[BUFFERS], sent;
static int buffer_of[2][QUEUE_MAX];
static u8 mac[6];
static const u32 address = 0x0200630a, host = 0x0100630a;
static u64 echoes, datagrams, replies;
static bool ended;

static u16 swap(u16 value) { return value << 8 | value >> 8; }

static void post(int buffer)
{
    struct part part = {&buffers[buffer], sizeof *buffers};
    int head = add(&queues[RX], &part, 0, 1);
    expect(head >= 0);
    buffer_of[RX][head] = buffer;
}

static void transmit(int buffer, u32 len)
{
    struct part parts[] = {{buffers[buffer].header, HEADER}, {buffers[buffer].frame, len}};
    memset(buffers[buffer].header, 0, HEADER);
    int head = add(&queues[TX], parts, 2, 0);
    expect(head >= 0);
    buffer_of[TX][head] = buffer;
}

// Turn the frame into its answer, in place. Returns whether there is one to send.
static bool answer(struct buffer *buffer, u32 len)
{
    struct arp *arp = &buffer->arp;
    struct ip *ip = &buffer->ip;
    if (len >= sizeof *arp && arp->ethernet.type == swap(0x0806) && arp->op == swap(1) && arp->to == address) {
        arp->op = swap(2);
        memcpy(arp->to_mac, arp->from_mac, 6);
        memcpy(arp->from_mac, mac, 6);
        arp->to = arp->from;
        arp->from = address;
    } else if (len >= sizeof *ip && ip->ethernet.type == swap(0x0800) && ip->version == 0x45 && ip->to == address) {
        ended |= ip->protocol == 17 && ip->udp.to == swap(9);
        datagrams += ip->protocol == 17 && ip->udp.to == swap(7);
        replies += ip->protocol == 1 && ip->icmp.type == 0;
        if (ip->protocol != 1 || ip->icmp.type != 8)
            return false;
        ip->icmp.type = 0;
        u32 sum = ip->icmp.checksum + 8;        // RFC 1624: its word fell by 0x0800, on the wire
        ip->icmp.checksum = sum + (sum >> 16);
        ip->to = ip->from;
        ip->from = address;
        echoes++;
    } else {
        return false;
    }
    memcpy(buffer->ethernet.to, buffer->ethernet.from, 6);
    memcpy(buffer->ethernet.from, mac, 6);
    return true;
}

static void serve(void)
{
    int head;
    u32 written;
    bool taken = false, given = false;
    while ((head = poll(&queues[TX], NULL)) >= 0) {
        if (buffer_of[TX][head] >= 0) {
            post(buffer_of[TX][head]);
            taken = true;
        }
    }
    while ((head = poll(&queues[RX], &written)) >= 0) {
        int buffer = buffer_of[RX][head];
        expect(written > HEADER && written <= sizeof *buffers);
        expect(buffers[buffer].header[10] == 1 && buffers[buffer].header[11] == 0);      // num_buffers
        if (answer(&buffers[buffer], written - HEADER)) {
            transmit(buffer, written - HEADER);
            given = true;
        } else {
            post(buffer);
            taken = true;
        }
    }
    if (given)
        kick(&queues[TX]);
    if (taken)
        kick(&queues[RX]);
}

static void flood(u64 count)
{
    struct part parts[] = {{sent.header, HEADER}, {sent.frame, sizeof sent.ip + 64}};
    for (u64 done = 0; done < count;) {
        int added = 0;
        while (poll(&queues[TX], NULL) >= 0)
            ;
        for (; added < 64 && done + added < count && add(&queues[TX], parts, 2, 0) >= 0; added++)
            ;
        done += added;
        if (added)
            kick(&queues[TX]);
        else
            relax();
    }
}

static void ping(u64 count)
{
    struct part parts[] = {{sent.header, HEADER}, {sent.frame, sizeof sent.ip + 64}};
    while (count--) {
        u64 before = replies;
        int head = add(&queues[TX], parts, 2, 0);
        expect(head >= 0);
        buffer_of[TX][head] = -1;
        kick(&queues[TX]);
        while (replies == before)
            serve();
    }
}

static void frame_to_host(u8 protocol)
{
    struct ip *ip = &sent.ip;
    u32 sum = 0;
    memset(ip->ethernet.to, 0xff, 6);
    memcpy(ip->ethernet.from, mac, 6);
    ip->ethernet.type = swap(0x0800);
    ip->version = 0x45;
    ip->len = swap(28 + 64);
    ip->ttl = 64;
    ip->protocol = protocol;
    ip->from = address;
    ip->to = host;
    if (protocol == 17) {
        ip->udp.from = ip->udp.to = swap(7);
        ip->udp.len = swap(8 + 64);
    } else {
        ip->icmp.type = 8;
        ip->icmp.checksum = swap(0xf7ff);   // of that, and zeros
    }
    for (int i = 0; i < 10; i++)
        sum += ((u16 *)&ip->version)[i];
    sum = (sum & 0xffff) + (sum >> 16);
    ip->checksum = ~(sum + (sum >> 16));
}

int main(void)
{
    u64 test = option("test=", 0), count = option("count=", 1000), rounds = option("rounds=", 1);
    device = find_device(NETWORK, 0);
    negotiate(&device, (option("event_idx=", 1) ? EVENT_IDX : 0) | (option("indirect=", 1) ? INDIRECT_DESC : 0) | MAC
              | (option("mergeable=", 1) ? MRG_RXBUF : 0), MAC);
    set_up(&queues[RX], &device, RX, QUEUE_MAX);
    set_up(&queues[TX], &device, TX, QUEUE_MAX);
    driver_ok(&device);
    for (int i = 0; i < 6; i++)
        mac[i] = *(volatile u8 *)(device.base + CONFIG + i);
    for (int i = 0; i < BUFFERS; i++) {
        post(i);
        buffer_of[TX][i] = -1;
    }
    kick(&queues[RX]);
    frame_to_host(test == 3 ? 1 : 17);
    report("ready", 1);
    for (; test == 0 && !ended;)
        serve();
    for (; test && rounds--;) {
        u64 from = ticks(), kicks = queues[TX].kicks + queues[RX].kicks;
        if (test == 1)
            flood(count);
        if (test == 3)
            ping(count);
        for (u64 before = datagrams; test == 2 && datagrams - before < count;)
            serve();
        report("ticks", ticks() - from);
        report("kicks", queues[TX].kicks + queues[RX].kicks - kicks);
    }
    report("echoes", echoes);
    return 0;
}
