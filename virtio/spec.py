# SPDX-License-Identifier: Apache-2.0
"""Constants of virtio. A bare § is one of OASIS Virtual I/O Device (VIRTIO) Version 1.2 in all of pyvmm."""

from __future__ import annotations

import struct

# Device status, §2.1
ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
DEVICE_NEEDS_RESET = 64
FAILED = 128
STATUS_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED  # a driver's, without DEVICE_NEEDS_RESET

# Device types, §5
TYPE_NET = 1
TYPE_BLOCK = 2
TYPE_CONSOLE = 3
TYPE_ENTROPY = 4
TYPE_BALLOON = 5
TYPE_VSOCK = 19
TYPE_FS = 26

# Feature bits of the ring and the transport, §6, as masks
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32

# The split virtqueue, §2.7
DESC = struct.Struct("<QIHH")  # addr, len, flags, next
DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

# virtio-mmio registers, §4.2.2, table 4.1
MMIO_MAGIC_VALUE = 0x000
MMIO_VERSION = 0x004
MMIO_DEVICE_ID = 0x008
MMIO_VENDOR_ID = 0x00C
MMIO_DEVICE_FEATURES = 0x010
MMIO_DEVICE_FEATURES_SEL = 0x014
MMIO_DRIVER_FEATURES = 0x020
MMIO_DRIVER_FEATURES_SEL = 0x024
MMIO_QUEUE_SEL = 0x030
MMIO_QUEUE_NUM_MAX = 0x034
MMIO_QUEUE_NUM = 0x038
MMIO_QUEUE_READY = 0x044
MMIO_QUEUE_NOTIFY = 0x050
MMIO_INTERRUPT_STATUS = 0x060
MMIO_INTERRUPT_ACK = 0x064
MMIO_STATUS = 0x070
MMIO_QUEUE_DESC_LOW = 0x080
MMIO_QUEUE_DESC_HIGH = 0x084
MMIO_QUEUE_DRIVER_LOW = 0x090
MMIO_QUEUE_DRIVER_HIGH = 0x094
MMIO_QUEUE_DEVICE_LOW = 0x0A0
MMIO_QUEUE_DEVICE_HIGH = 0x0A4
MMIO_SHM_SEL = 0x0AC
MMIO_SHM_LEN_LOW = 0x0B0
MMIO_SHM_LEN_HIGH = 0x0B4
MMIO_SHM_BASE_LOW = 0x0B8
MMIO_SHM_BASE_HIGH = 0x0BC
MMIO_CONFIG_GENERATION = 0x0FC
MMIO_CONFIG = 0x100
MMIO_MAGIC = 0x74726976  # "virt"

INTERRUPT_USED = 1  # §4.2.2, InterruptStatus
INTERRUPT_CONFIG = 2

# Block device, §5.2
BLK_F_SEG_MAX = 1 << 2
BLK_F_RO = 1 << 5
BLK_F_BLK_SIZE = 1 << 6
BLK_F_FLUSH = 1 << 9
BLK_F_TOPOLOGY = 1 << 10
BLK_F_MQ = 1 << 12
BLK_F_DISCARD = 1 << 13
BLK_F_WRITE_ZEROES = 1 << 14

BLK_SECTOR = 512
# capacity; size_max, seg_max; cylinders, heads, sectors; blk_size; physical_block_exp, alignment_offset,
# min_io_size, opt_io_size; writeback, unused, num_queues; discard and write-zeroes limits: 60 bytes
BLK_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")

# Console device, §5.3
CONSOLE_F_SIZE = 1 << 0
CONSOLE_F_MULTIPORT = 1 << 1
CONSOLE_F_EMERG_WRITE = 1 << 2

CONSOLE_DEVICE_READY = 0
CONSOLE_DEVICE_ADD = 1
CONSOLE_PORT_READY = 3
CONSOLE_CONSOLE_PORT = 4
CONSOLE_RESIZE = 5
CONSOLE_PORT_OPEN = 6
CONSOLE_PORT_NAME = 7

CONSOLE_CONFIG = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr
CONSOLE_CONFIG_EMERG_WR = 8  # its offset
CONSOLE_CONTROL = struct.Struct("<IHH")  # id, event, value
# Of a RESIZE: cols, rows. Linux has read it so and the other way round; Debian 12's 6.1.192 does as §5.3.6.2 says.
CONSOLE_SIZE = struct.Struct("<HH")

# Traditional memory balloon device, §5.5
BALLOON_F_STATS_VQ = 1 << 1
BALLOON_F_DEFLATE_ON_OOM = 1 << 2
BALLOON_F_PAGE_POISON = 1 << 4
BALLOON_F_PAGE_REPORTING = 1 << 5

BALLOON_PAGE = 4096  # whatever the guest's own page size
BALLOON_CONFIG = struct.Struct("<IIII")  # num_pages, actual, free_page_hint_cmd_id, poison_val
BALLOON_STAT = struct.Struct("<HQ")  # tag, val

# Socket device, §5.10
VSOCK_F_STREAM = 1 << 0

VSOCK_CONFIG = struct.Struct("<Q")  # guest_cid

# Network device, §5.1
NET_F_CSUM = 1 << 0
NET_F_GUEST_CSUM = 1 << 1
NET_F_CTRL_GUEST_OFFLOADS = 1 << 2
NET_F_MTU = 1 << 3
NET_F_MAC = 1 << 5
NET_F_GUEST_TSO4 = 1 << 7
NET_F_GUEST_TSO6 = 1 << 8
NET_F_GUEST_ECN = 1 << 9
NET_F_GUEST_UFO = 1 << 10
NET_F_HOST_TSO4 = 1 << 11
NET_F_HOST_TSO6 = 1 << 12
NET_F_HOST_ECN = 1 << 13
NET_F_HOST_UFO = 1 << 14
NET_F_MRG_RXBUF = 1 << 15
NET_F_STATUS = 1 << 16
NET_F_CTRL_VQ = 1 << 17
NET_F_CTRL_RX = 1 << 18
NET_F_CTRL_VLAN = 1 << 19
NET_F_MQ = 1 << 22
NET_F_CTRL_MAC_ADDR = 1 << 23

NET_S_LINK_UP = 1
NET_CONFIG = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
# class and command of a request on the control queue, §5.1.6.5
NET_CTRL_RX = 0  # commands 0 to 5: PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST
NET_CTRL_MAC = 1
NET_CTRL_MAC_TABLE_SET = 0
NET_CTRL_MAC_ADDR_SET = 1
NET_CTRL_VLAN = 2  # commands 0 and 1: ADD, DEL
NET_CTRL_MQ = 4
NET_CTRL_MQ_VQ_PAIRS_SET = 0
NET_CTRL_GUEST_OFFLOADS = 5
NET_CTRL_GUEST_OFFLOADS_SET = 0
NET_OK = 0
NET_ERR = 1
