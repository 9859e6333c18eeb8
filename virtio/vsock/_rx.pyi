# SPDX-License-Identifier: Apache-2.0
from virtio.vsock._sockets import VsockSockets

class VsockRx(VsockSockets): ...
