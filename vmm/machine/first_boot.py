# SPDX-License-Identifier: Apache-2.0
"""What a machine starts with that is made of no image: its kernel and tables in memory, and the state of its vCPUs."""

from __future__ import annotations

from boot import acpi, cpu, load, mptable
from boot.board import PARTS
from vmm.cmdline import Cmdline
from vmm.errors import ConfigError
from vmm.kvm import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from boot.load import Loaded
    from vmm.config.vm import VmConfig
    from vmm.kvm.vcpu import Vcpu
    from vmm.kvm.vm import Kvm
    from vmm.memory import GuestMemory


def check_kvm(kvm: Kvm, config: VmConfig) -> None:
    """Refuse a KVM on which this machine could not run.

    :raises ConfigError: KVM lacks something, or allows too few vCPUs
    """
    template = config.cpu_template
    more, less = (template.capabilities, template.not_required) if template else ((), ())
    if lacking := kvm.lacking(more, less):
        raise ConfigError("--kvm", config.kvm, f"lacks {', '.join(lacking)}; use Linux 4.11 or later")
    if config.cpus > kvm.max_vcpus():
        raise ConfigError("cpus", config.cpus, f"this KVM allows at most {kvm.max_vcpus()}")


def load_kernel(memory: GuestMemory, config: VmConfig, virtio: list[tuple[int, int, int]]) -> tuple[Loaded, str]:
    """Write kernel, initrd, ACPI and MP tables to `memory`.

    :param virtio: address, size and interrupt line of each virtio device
    :returns: where they are, and the command line
    :raises ConfigError: a file or the command line cannot be used
    """
    cmdline = Cmdline(config.full_cmdline)
    for base, size, gsi in virtio:  # for kernels without ACPI; source: Linux drivers/virtio/virtio_mmio.c
        cmdline.append(f"virtio_mmio.device={size >> 10}K@{base:#x}:{gsi}")
    loaded = load.load(
        memory, config.kernel, initrd_path=config.initrd, cmdline=str(cmdline),
        protocol=config.protocol, unpack=config.unpack,
    )  # fmt: skip
    acpi.write(
        memory, cpus=config.cpus, virtio=virtio,
        parts=[part for part in PARTS if part.name != "i8042" or config.keyboard],
    )  # fmt: skip
    mptable.write(memory, cpus=config.cpus)
    return loaded, str(cmdline)


def set_up_vcpus(vcpus: Sequence[Vcpu], kvm: Kvm, config: VmConfig, memory: GuestMemory, loaded: Loaded) -> None:
    """Give each vCPU its CPUID and MSRs, and the first one the registers with which the kernel is entered.

    :raises KvmError: KVM refused it
    """
    entries = kvm.supported_cpuid()
    template = config.cpu_template
    if template is not None:
        template.change_cpuid(entries)
    count, threads = config.cpus, 2 if config.smt and config.cpus > 1 else 1
    deadline = bool(kvm.check(abi.KVM_CAP_TSC_DEADLINE_TIMER))
    for index, vcpu in enumerate(vcpus):
        cpu.shape_cpuid(entries, index=index, count=count, threads=threads, tsc_deadline=deadline)
        vcpu.set_cpuid(entries)
        vcpu.set_msrs(cpu.BOOT_MSRS)
        if template is not None and template.msrs:
            old = vcpu.get_msrs(tuple(template.msrs))
            vcpu.set_msrs({msr: bits(old[msr]) for msr, bits in template.msrs.items()})
    first = vcpus[0]
    sregs, regs = first.sregs, first.regs
    if loaded.protocol == "pvh":
        cpu.enter_pvh(memory, sregs, regs, entry=loaded.entry)
    else:
        cpu.enter_linux64(memory, sregs, regs, entry=loaded.entry)
    first.sregs, first.regs = sregs, regs
