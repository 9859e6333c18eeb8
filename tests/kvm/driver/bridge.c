// SPDX-License-Identifier: Apache-2.0
// A bridge between two network devices: each sends what the other receives, until the VM ends. So the host's network
// stack, behind one device, can talk to a program behind the other.
#include "virtio.h"

enum { NETWORK = 1, RX = 0, TX = 1, HEADER = 12, BUFFERS = 128, SIZE = 2048 };
#define MRG_RXBUF (1ull << 15)

static struct device devices[2];
static struct queue queues[2][2];
static u8 buffers[2][BUFFERS][SIZE];
static int buffer_of[2][2][QUEUE_MAX];

static void post(int side, int buffer)
{
    struct part part = {buffers[side][buffer], SIZE};
    int head = add(&queues[side][RX], &part, 0, 1);
    expect(head >= 0);
    buffer_of[side][RX][head] = buffer;
}

static void serve(int from)
{
    int head, to = !from;
    u32 written;
    bool taken = false, given = false;
    while ((head = poll(&queues[to][TX], NULL)) >= 0) {
        post(from, buffer_of[to][TX][head]);
        taken = true;
    }
    while ((head = poll(&queues[from][RX], &written)) >= 0) {
        int buffer = buffer_of[from][RX][head];
        u8 *at = buffers[from][buffer];
        expect(written > HEADER && written <= SIZE && at[10] == 1 && at[11] == 0);    // num_buffers
        memset(at, 0, HEADER);
        struct part part = {at, written};
        head = add(&queues[to][TX], &part, 1, 0);
        expect(head >= 0);
        buffer_of[to][TX][head] = buffer;
        given = true;
    }
    if (given)
        kick(&queues[to][TX]);
    if (taken)
        kick(&queues[from][RX]);
}

int main(void)
{
    for (int side = 0; side < 2; side++) {
        devices[side] = find_device(NETWORK, side);
        negotiate(&devices[side], EVENT_IDX | MRG_RXBUF, 0);
        for (int index = 0; index < 2; index++)
            set_up(&queues[side][index], &devices[side], index, QUEUE_MAX);
        driver_ok(&devices[side]);
        for (int i = 0; i < BUFFERS; i++)
            post(side, i);
        kick(&queues[side][RX]);
    }
    report("ready", 1);
    for (;;) {
        serve(0);
        serve(1);
        relax();
    }
}
