# SPDX-License-Identifier: Apache-2.0
"""The network device (virtio 1.2 §5.1)."""
