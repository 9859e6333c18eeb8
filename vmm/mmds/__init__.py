# SPDX-License-Identifier: Apache-2.0
"""The microVM metadata service, on the host's side; the guest's end of it is ``virtio.net.mmds``."""
