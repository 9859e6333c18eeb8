# SPDX-License-Identifier: Apache-2.0
"""What keeps a VMM in: the jailer, system call filters, imports made before."""
