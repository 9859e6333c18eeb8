# SPDX-License-Identifier: Apache-2.0
"""The file system device (virtio 1.2 §5.11): a shared directory."""
