# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm: its ioctls, structures, vCPUs and their state."""

from vmm import launched

launched.spare_ctypes("vmm.kvm.abi")
