# SPDX-License-Identifier: Apache-2.0
"""The block device (virtio 1.2 §5.2)."""
