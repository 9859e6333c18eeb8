# SPDX-License-Identifier: Apache-2.0
"""What a VM and each of its devices is to be. Each parameter is declared once, as ``vmm.config.option`` describes."""
