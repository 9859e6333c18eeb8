# SPDX-License-Identifier: Apache-2.0
"""The REST API on a unix socket: Firecracker 1.12's, and a few calls of our own in its style."""

API_VERSION = "1.12.1"
