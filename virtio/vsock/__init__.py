# SPDX-License-Identifier: Apache-2.0
"""The socket device (virtio 1.2 §5.10)."""
