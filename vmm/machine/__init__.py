# SPDX-License-Identifier: Apache-2.0
"""A machine: built, run, frozen, forked."""
