// SPDX-License-Identifier: Apache-2.0
// A driver for the socket device. test= selects one of these:
//   0: connect to port 7003 of the host, which echoes, and compare
//   1: echo what the host sends to port 6000
//   2, 3, 4: measure sending to port 7001, receiving from port 7002, and round trips
#include "virtio.h"

enum {
    SOCKET = 19, RX = 0, TX = 1, HOST = 2, REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST,
    BUFFERS = 64, ROOM = 256 << 10, SOURCE = 1 << 20, CONNECTIONS = 16,
};

struct header {
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, len;
    u16 type, op;
    u32 flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

struct connection {
    u32 local, remote, peer_alloc, peer_fwd, sent;
    u32 arrived, taken, freed, told;    // of the bytes in `room`: in all; looked at; gone; as the peer was last told
    bool open, closing, closed;
    u8 room[ROOM];
};

static struct device device;
static struct queue queues[3];
static struct connection connections[CONNECTIONS];
static int count;
static u64 cid, chunk;
static struct header rx_headers[QUEUE_MAX], tx_headers[QUEUE_MAX];
static struct connection *from_room[QUEUE_MAX];     // by head of TX: whose room the payload lies in
static int buffer_of[QUEUE_MAX];                    // by head of RX
static u8 buffers[BUFFERS][65536], source[2 * SOURCE];
static bool posted;

static void post(int buffer)
{
    u16 head = queues[RX].free;
    struct part parts[] = {{&rx_headers[head], sizeof *rx_headers}, {buffers[buffer], chunk}};
    buffer_of[head] = buffer;
    expect(add(&queues[RX], parts, 0, 2) == head);
    posted = true;
}

static bool reap(void)
{
    int head = poll(&queues[TX], NULL);
    if (head >= 0 && from_room[head])
        from_room[head]->freed += tx_headers[head].len;
    return head >= 0;
}

static void send(struct connection *to, u16 op, u32 flags, void *data, u32 len, bool from_its_room)
{
    while (queues[TX].free_count < 2)
        if (!reap())
            relax();
    u16 head = queues[TX].free;
    tx_headers[head] = (struct header){cid, HOST, to->local, to->remote, len, 1, op, flags, ROOM, to->freed};
    to->told = to->freed;
    to->sent += len;
    from_room[head] = from_its_room ? to : NULL;
    struct part parts[] = {{&tx_headers[head], sizeof *tx_headers}, {data, len}};
    expect(add(&queues[TX], parts, len ? 2 : 1, 0) == head);
    kick(&queues[TX]);
}

static void say(struct connection *to, u16 op, u32 flags) { send(to, op, flags, NULL, 0, false); }
static u32 credit(struct connection *to) { return to->peer_alloc - (to->sent - to->peer_fwd); }

static struct connection *find_connection(const struct header *header)
{
    for (int i = 0; i < count; i++)
        if (connections[i].local == header->dst_port && connections[i].remote == header->src_port)
            return &connections[i];
    expect(header->op == REQUEST && header->dst_port == 6000 && count < CONNECTIONS);
    connections[count].local = header->dst_port;
    connections[count].remote = header->src_port;
    return &connections[count++];
}

static void store(struct connection *at, const u8 *data, u32 len)
{
    u32 offset = at->arrived % ROOM, first = len < ROOM - offset ? len : ROOM - offset;
    expect(at->arrived + len - at->freed <= ROOM);      // what we granted
    memcpy(at->room + offset, data, first);
    memcpy(at->room, data + first, len - first);
    at->arrived += len;
}

// Handle the packets that have arrived.
static void receive(void)
{
    u32 written;
    int head;
    while (reap())
        ;
    while ((head = poll(&queues[RX], &written)) >= 0) {
        struct header *header = &rx_headers[head];
        int buffer = buffer_of[head];
        expect(written == sizeof *header + header->len);
        expect(header->src_cid == HOST && header->dst_cid == cid && header->type == 1);
        struct connection *from = find_connection(header);
        from->peer_alloc = header->buf_alloc;
        from->peer_fwd = header->fwd_cnt;
        switch (header->op) {
        case REQUEST:
            say(from, RESPONSE, 0);
            // fall through
        case RESPONSE: from->open = true; break;
        case RST: from->closed = true; break;
        case SHUTDOWN: from->closing = true; break;
        case CREDIT_REQUEST: say(from, CREDIT_UPDATE, 0); break;
        case RW: store(from, buffers[buffer], header->len); break;
        default: expect(header->op == CREDIT_UPDATE);
        }
        post(buffer);
    }
    if (posted)
        kick(&queues[RX]);
    posted = false;
    for (int i = 0; i < count; i++)
        if (connections[i].open && !connections[i].closed && connections[i].freed - connections[i].told >= ROOM / 2)
            say(&connections[i], CREDIT_UPDATE, 0);
}

static struct connection *connect(u32 port)
{
    struct connection *made = &connections[count];
    made->local = 1024 + count++;
    made->remote = port;
    say(made, REQUEST, 0);
    while (!made->open) {
        expect(!made->closed);
        receive();
    }
    return made;
}

static void hang_up(struct connection *from)
{
    say(from, SHUTDOWN, 3);
    while (!from->closed)
        receive();
}

// Send SOURCE bytes on each connection and receive them again, on all connections at once.
static void echoed(int number)
{
    u32 back = 0;
    for (int i = 0; i < number; i++)
        connect(7003);
    while (back < number * SOURCE) {
        for (int i = 0; i < number; i++) {
            struct connection *to = &connections[i];
            u8 *its = source + 8 * i;
            u32 len = credit(to) < chunk ? credit(to) : chunk;
            len = len < SOURCE - to->sent ? len : SOURCE - to->sent;
            if (len)
                send(to, RW, 0, its + to->sent, len, false);
            for (; to->taken != to->arrived; to->taken++, back++)
                expect(to->room[to->taken % ROOM] == its[to->taken]);
            to->freed = to->taken;
        }
        receive();
    }
    for (int i = 0; i < number; i++) {
        expect(connections[i].taken == SOURCE && !connections[i].closed);
        hang_up(&connections[i]);
    }
    report("bytes", back);
}

// Echo what the host sends, until `number` connections have ended.
static void echo(int number)
{
    u64 bytes = 0;
    int ended = 0;
    report("listening", 6000);
    while (ended < number) {
        receive();
        for (int i = 0; i < count; i++) {
            struct connection *to = &connections[i];
            u32 len = to->arrived - to->taken, offset = to->taken % ROOM;
            len = len < chunk ? len : chunk;
            len = len < credit(to) ? len : credit(to);
            len = len < ROOM - offset ? len : ROOM - offset;
            if (len) {
                send(to, RW, 0, to->room + offset, len, true);
                to->taken += len;
                bytes += len;
            } else if (to->closing && !to->closed && to->freed == to->arrived) {
                say(to, RST, 0);
                to->closed = true;
                ended++;
            }
        }
    }
    while (queues[TX].free_count < queues[TX].size)
        if (!reap())
            relax();
    report("bytes", bytes);
}

static void measure(int what)
{
    u64 bytes = option("count=", 64 << 20), rounds = option("rounds=", 1), kicks;
    struct connection *peer = connect(what == 2 ? 7001 : what == 3 ? 7002 : 7003);
    for (; rounds--; report("kicks", queues[TX].kicks + queues[RX].kicks - kicks)) {
        u64 from = ticks(), done = 0;
        kicks = queues[TX].kicks + queues[RX].kicks;
        while (done < bytes) {
            u32 len = what == 2 ? chunk : what == 4 && peer->sent == peer->taken;
            len = len < credit(peer) ? len : credit(peer);
            if (len)
                send(peer, RW, 0, source, len, false);
            receive();
            done += what == 2 ? len : peer->arrived - peer->taken;
            peer->freed = peer->taken = peer->arrived;
        }
        report("ticks", ticks() - from);
    }
}

int main(void)
{
    u64 test = option("test=", 0), number = option("connections=", 1);
    chunk = option("chunk=", 4096);
    device = find_device(SOCKET, 0);
    negotiate(&device, (option("event_idx=", 1) ? EVENT_IDX : 0) | (option("indirect=", 1) ? INDIRECT_DESC : 0), 0);
    for (int i = 0; i < 3; i++)
        set_up(&queues[i], &device, i, QUEUE_MAX);
    driver_ok(&device);
    cid = read32(device.base + CONFIG) | (u64)read32(device.base + CONFIG + 4) << 32;
    report("cid", cid);
    for (u32 i = 0; i < sizeof source / 8; i++)
        ((u64 *)source)[i] = (i + 1) * 0x9e3779b97f4a7c15;
    for (int i = 0; i < BUFFERS; i++)
        post(i);
    kick(&queues[RX]);
    if (test == 0)
        echoed(number);
    else if (test == 1)
        echo(number);
    else
        measure(test);
    return 0;
}
