# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm: its ioctls, structures, vCPUs and their state."""
