# SPDX-License-Identifier: Apache-2.0
from typing import Any

READS: tuple[int, ...]

class StateAccess:
    """How the state of this host's KVM is laid out; one a process is enough.

    :param kvm_fd: /dev/kvm; used by the constructor only
    """

    def __init__(self, kvm_fd: int) -> None: ...
    def save_vcpu(self, fd: int) -> dict[str, Any]:
        """The state of a vCPU that is not in KVM_RUN, nor between an exit and the next KVM_RUN.

        :returns: each part by its name in the API, as the bytes of its structure
        :raises KvmError: KVM refused a part; ``what`` names it
        """
    def restore_vcpu(self, fd: int, state: dict[str, Any]) -> None:
        """Give a new vCPU that state. Its TSC has gone on meanwhile, by the host's time of day.

        :raises SnapshotError: a part has another size than here
        :raises KvmError: KVM refused a part; ``what`` names it
        """
    def save_vm(self, fd: int, *, timer: bool) -> dict[str, Any]:
        """The state of a VM's interrupt controllers, timer and clock; its vCPUs are held.

        :param timer: it has KVM's timer; False: the state of that is empty
        """
    def restore_vm(self, fd: int, state: dict[str, Any], *, realtime: bool) -> None:
        """Give a VM that state; its vCPUs have not run, and it has KVM's timer if the state has one.

        :param realtime: the guest's clock has gone on meanwhile; False: it goes on from where it was
        """
    def get_clock(self, fd: int) -> bytes:
        """kvm-clock, and the host's time of day beside it."""
    def set_clock(self, fd: int, clock: bytes, *, realtime: bool) -> None:
        """Set kvm-clock to what ``get_clock`` said.

        :param realtime: as for ``restore_vm``
        """
