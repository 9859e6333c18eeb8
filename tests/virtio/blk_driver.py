# SPDX-License-Identifier: Apache-2.0
"""A block device's requests (§5.2.6), as its driver writes them."""

from __future__ import annotations

import struct

T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13

S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

HEADER = struct.Struct("<IIQ")  # type, reserved, sector
RANGE = struct.Struct("<QII")  # of DISCARD and WRITE_ZEROES: sector, sectors, flags
RANGE_UNMAP = 1
