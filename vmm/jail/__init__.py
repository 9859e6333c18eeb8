# SPDX-License-Identifier: Apache-2.0
"""Isolation of a VMM: the jailer, the system call filters, and the imports made before them."""
