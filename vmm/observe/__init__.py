# SPDX-License-Identifier: Apache-2.0
"""What looks into a machine that runs, and tells of it: it knows machines, and no machine knows it."""
