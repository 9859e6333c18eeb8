// SPDX-License-Identifier: Apache-2.0
// A driver for the file system device. It reads the file "input" of the share, by requests and through the DAX window
// if there is one, and creates "output". Source: linux/fuse.h.
#include "virtio.h"
#include <linux/fuse.h>

enum { FILE_SYSTEM = 26, PIECE = 64 << 10, WINDOW_PIECE = 2 << 20, RDWR = 2, CREAT = 0100 };

static struct device device;
static struct queue hiprio, requests;
static u8 data[4 << 20] __attribute__((aligned(4096))), again[PIECE];
static struct fuse_in_header in;
static struct fuse_out_header out;
static u64 unique;

// Send one request: its argument, the data behind it, a buffer for the answer. Returns the payload's length.
static u32 request(u32 opcode, u64 node, const void *argument, u32 argument_len, const void *more, u32 more_len,
                   void *answer, u32 answer_len)
{
    struct part parts[5] = {{&in, sizeof in}};
    int readable = 1, writable = 1;
    u32 written;
    in = (struct fuse_in_header){sizeof in + argument_len + more_len, opcode, ++unique, node};
    if (argument_len)
        parts[readable++] = (struct part){(void *)argument, argument_len};
    if (more_len)
        parts[readable++] = (struct part){(void *)more, more_len};
    parts[readable] = (struct part){&out, sizeof out};
    if (answer_len)
        parts[readable + writable++] = (struct part){answer, answer_len};
    expect(add(&requests, parts, readable, writable) >= 0);
    kick(&requests);
    wait(&requests, &written);
    expect(written == out.len && out.unique == unique);
    if (out.error) {
        report("opcode", opcode);
        report("errno", -out.error);
    }
    expect(out.error == 0);
    return out.len - sizeof out;
}

static u64 checksum(const u8 *at, u64 len)
{
    u64 sum = 0xcbf29ce484222325;
    for (; len--; at++)
        sum = (sum ^ *at) * 0x100000001b3;
    return sum;
}

static u64 read_file(u64 node, u64 fh)
{
    struct fuse_read_in argument = {fh, 0, PIECE};
    u32 got;
    do {
        expect(argument.offset + PIECE <= sizeof data);
        got = request(FUSE_READ, node, &argument, sizeof argument, NULL, 0, data + argument.offset, PIECE);
        argument.offset += got;
    } while (got == PIECE);
    return argument.offset;
}

static void release(u64 node, u64 fh)
{
    struct fuse_release_in argument = {fh};
    request(FUSE_RELEASE, node, &argument, sizeof argument, NULL, 0, NULL, 0);
}

// The window shows the same bytes as READ, and bytes written to it are in the file.
static void through_window(u64 base, u64 node, u64 fh, u64 size)
{
    u8 *window = (u8 *)base;
    struct { u32 count; struct fuse_removemapping_one one; } __attribute__((packed)) undo = {1, {0, WINDOW_PIECE}};
    struct fuse_read_in look = {fh, 0, PIECE};
    for (u64 offset = 0; offset < size; offset += WINDOW_PIECE) {
        struct fuse_setupmapping_in map = {fh, offset, WINDOW_PIECE,
                                           FUSE_SETUPMAPPING_FLAG_READ | FUSE_SETUPMAPPING_FLAG_WRITE, 0};
        request(FUSE_SETUPMAPPING, node, &map, sizeof map, NULL, 0, NULL, 0);
        u64 len = size - offset < WINDOW_PIECE ? size - offset : WINDOW_PIECE;
        for (u64 at = 0; at < len; at++)
            expect(window[at] == data[offset + at]);
        window[len - 1] ^= 0xff;
        request(FUSE_REMOVEMAPPING, node, &undo, sizeof undo, NULL, 0, NULL, 0);
        look.offset = offset + len - 1;
        expect(request(FUSE_READ, node, &look, sizeof look, NULL, 0, again, PIECE) >= 1);
        expect(again[0] == (data[offset + len - 1] ^ 0xff));
    }
    report("dax", size);
}

int main(void)
{
    struct fuse_init_in hello = {7, 38, 0, FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_MAP_ALIGNMENT | FUSE_INIT_EXT};
    struct fuse_init_out welcome;
    struct fuse_entry_out entry;
    struct fuse_open_in how = {RDWR};
    struct fuse_open_out opened;
    struct { struct fuse_entry_out entry; struct fuse_open_out opened; } made;
    struct fuse_create_in create = {RDWR | CREAT, 0100640};
    u64 kept = 0;

    device = find_device(FILE_SYSTEM, 0);
    negotiate(&device, (option("event_idx=", 1) ? EVENT_IDX : 0) | (option("indirect=", 1) ? INDIRECT_DESC : 0), 0);
    set_up(&hiprio, &device, 0, 16);
    set_up(&requests, &device, 1, 64);
    driver_ok(&device);
    write32(device.base + SHM_SEL, 0);
    u64 window = read32(device.base + SHM_BASE) | (u64)read32(device.base + SHM_BASE + 4) << 32;
    u64 window_len = read32(device.base + SHM_LEN) | (u64)read32(device.base + SHM_LEN + 4) << 32;

    request(FUSE_INIT, 0, &hello, sizeof hello, NULL, 0, &welcome, sizeof welcome);
    expect(welcome.major == 7 && welcome.max_write >= PIECE);
    request(FUSE_LOOKUP, 1, "input", 6, NULL, 0, &entry, sizeof entry);
    request(FUSE_OPEN, entry.nodeid, &how, sizeof how, NULL, 0, &opened, sizeof opened);
    u64 size = read_file(entry.nodeid, opened.fh);
    expect(size == entry.attr.size);
    report("size", size);
    report("checksum", checksum(data, size));
    if (~window_len)
        through_window(window, entry.nodeid, opened.fh, size);
    release(entry.nodeid, opened.fh);

    request(FUSE_CREATE, 1, &create, sizeof create, "output", 7, &made, sizeof made);
    for (u32 at = 0; at < size; at += PIECE) {
        struct fuse_write_in write = {made.opened.fh, at, size - at < PIECE ? size - at : PIECE};
        struct fuse_write_out wrote;
        for (u32 byte = at; byte < at + write.size; byte++)
            data[byte] = ~data[byte];
        request(FUSE_WRITE, made.entry.nodeid, &write, sizeof write, data + at, write.size, &wrote, sizeof wrote);
        expect(wrote.size == write.size);
        kept += wrote.size;
    }
    release(made.entry.nodeid, made.opened.fh);
    // Requests without an answer go to the hiprio queue.
    struct { struct fuse_in_header in; struct fuse_forget_in forget; } forget = {
        {sizeof forget, FUSE_FORGET, ++unique, entry.nodeid}, {1}};
    struct part part = {&forget, sizeof forget};
    add(&hiprio, &part, 1, 0);
    kick(&hiprio);
    wait(&hiprio, NULL);
    report("written", kept);
    return 0;
}
