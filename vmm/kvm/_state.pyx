# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Save and restore the KVM state of a vCPU and of a VM: one ioctl for each part, a few hundred nanoseconds each.

Source: Linux Documentation/virt/kvm/api.rst. The order matters, because some parts change others. MP_STATE is read
first, because reading it may accept events, and VCPU_EVENTS last. The local APIC is set after SREGS, which hold its
address, and before the MSRs, because setting it would clear the TSC deadline. The deadline is written after the TSC.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from time import time_ns

from vmm.errors import KvmError, SnapshotError

cdef extern from *:
    """
    #include <linux/kvm.h>
    #include <sys/ioctl.h>
    static inline int kvm_call(int fd, unsigned long request, void *argument) { return ioctl(fd, request, argument); }
    static inline size_t kvm_size(unsigned long request) { return _IOC_SIZE(request); }
    #ifndef KVM_CLOCK_REALTIME
    #define KVM_CLOCK_REALTIME (1 << 2)
    #endif
    #ifndef KVM_CAP_XSAVE2
    #define KVM_CAP_XSAVE2 208
    #define KVM_GET_XSAVE2 _IOR(KVMIO, 0xcf, struct kvm_xsave)
    #endif
    """
    int kvm_call(int fd, unsigned long request, void *argument) nogil
    size_t kvm_size(unsigned long request) nogil        # of its structure, in bytes
    struct kvm_msr_entry:
        uint32_t index
        uint32_t reserved
        uint64_t data
    struct kvm_msrs:
        uint32_t nmsrs
        uint32_t pad
    struct kvm_cpuid2:
        uint32_t nent
        uint32_t padding
    struct kvm_pic_state:
        uint8_t last_irr
    struct kvm_ioapic_state:
        uint32_t irr
    union kvm_chip "":              # it has no name there
        kvm_pic_state pic
        kvm_ioapic_state ioapic
    struct kvm_irqchip:
        uint32_t chip_id
        kvm_chip chip
    struct kvm_irq_level:
        uint32_t irq
        uint32_t level
    struct kvm_clock_data:
        uint64_t clock
        uint32_t flags
    unsigned long KVM_CHECK_EXTENSION, KVM_GET_MSR_INDEX_LIST, KVM_GET_MSRS, KVM_SET_MSRS, KVM_GET_CPUID2
    unsigned long KVM_SET_CPUID2, KVM_GET_MP_STATE, KVM_SET_MP_STATE, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS
    unsigned long KVM_SET_SREGS, KVM_GET_SREGS2, KVM_SET_SREGS2, KVM_GET_XSAVE, KVM_GET_XSAVE2, KVM_SET_XSAVE
    unsigned long KVM_GET_XCRS, KVM_SET_XCRS, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, KVM_GET_LAPIC, KVM_SET_LAPIC
    unsigned long KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, KVM_GET_PIT2, KVM_SET_PIT2, KVM_GET_IRQCHIP
    unsigned long KVM_SET_IRQCHIP, KVM_GET_CLOCK, KVM_SET_CLOCK, KVM_KVMCLOCK_CTRL, KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ
    unsigned long KVM_IRQ_LINE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_SLAVE, KVM_IOAPIC_NUM_PINS
    uint32_t KVM_CAP_SREGS2, KVM_CAP_XSAVE2, KVM_CAP_XCRS, KVM_CAP_TSC_CONTROL, KVM_CLOCK_REALTIME

# Every ioctl that reads state; the seccomp rules allow a saving thread these and no others.
READS = (
    KVM_CHECK_EXTENSION, KVM_GET_MSR_INDEX_LIST, KVM_GET_MSRS, KVM_GET_CPUID2, KVM_GET_MP_STATE, KVM_GET_REGS,
    KVM_GET_SREGS, KVM_GET_SREGS2, KVM_GET_XSAVE, KVM_GET_XSAVE2, KVM_GET_XCRS, KVM_GET_DEBUGREGS, KVM_GET_LAPIC,
    KVM_GET_VCPU_EVENTS, KVM_GET_PIT2, KVM_GET_IRQCHIP, KVM_GET_CLOCK, KVM_GET_TSC_KHZ,
)

cdef enum:
    REALTIME = 2                # index of `realtime` in kvm_clock_data's 64-bit words, since Linux 5.16
    MSRS = 512
    CPUID_ENTRIES = 256
    IRQCHIPS = 3
    MSR_IA32_TSC = 0x10
    MSR_IA32_TSC_DEADLINE = 0x6e0
    MSR_KVM_SYSTEM_TIME = 0x12
    MSR_KVM_SYSTEM_TIME_NEW = 0x4b564d01
    TSC_TOLERANCE_PPM = 250     # as in other VMMs: what NTP corrects

cdef object _passed_since(uint64_t then):
    # Nanoseconds since `then`; 0 if `then` is 0 (unknown), or if the host's clock was set back.
    return max(time_ns() - then, 0) if then else 0

cdef struct MsrBatch:
    kvm_msrs header
    kvm_msr_entry[MSRS] entries

cdef struct CpuidTable:
    kvm_cpuid2 header
    uint8_t[CPUID_ENTRIES * 40] entries


cdef int _do(int fd, unsigned long request, void *argument, str name) except -1:
    cdef int result = kvm_call(fd, request, argument)
    if result < 0:
        raise KvmError(errno, name)
    return result


cdef bytes _get(int fd, unsigned long request, str name, size_t size=0):
    # `size`: the structure's, where the request does not have it.
    cdef bytes data = PyBytes_FromStringAndSize(NULL, size or kvm_size(request))
    _do(fd, request, PyBytes_AS_STRING(data), name)
    return data


cdef int _set(int fd, unsigned long request, data, str name, size_t size=0) except -1:
    # `data` may come from a file: check its size here; KVM checks the contents.
    size = size or kvm_size(request)
    if not isinstance(data, bytes) or <size_t>len(data) != size:
        raise SnapshotError(name, f"has {len(data) if isinstance(data, bytes) else 'no'} bytes, KVM takes {size}")
    # KVM only reads the buffer, so the bytes object does not change.
    _do(fd, request, PyBytes_AS_STRING(data), name)
    return 0


cdef _lower_lines(int fd, list chips):
    # An edge is a line that KVM's worker thread raises and then lowers. A save between these steps has the line high,
    # and in the copy nobody lowers it: the next raise would not be an edge.
    cdef kvm_irq_level line
    cdef uint32_t high = 0
    cdef const kvm_irqchip *chip
    for data in chips:
        chip = <const kvm_irqchip *>PyBytes_AS_STRING(data)
        if chip.chip_id == KVM_IRQCHIP_IOAPIC:
            high |= chip.chip.ioapic.irr
        else:
            high |= <uint32_t>chip.chip.pic.last_irr << (8 if chip.chip_id == KVM_IRQCHIP_PIC_SLAVE else 0)
    line.level = 0
    for line.irq in range(KVM_IOAPIC_NUM_PINS):
        if high >> line.irq & 1:
            _do(fd, KVM_IRQ_LINE, &line, "KVM_IRQ_LINE")


cdef class StateAccess:
    """Saves and restores state with the features of this host's KVM; one object per process is enough.

    :param kvm_fd: descriptor of /dev/kvm; borrowed, used by the constructor only
    """

    cdef size_t xsave_bytes         # bytes that KVM_SET_XSAVE reads
    cdef bint has_xsave2
    cdef bint has_sregs2
    cdef bint has_xcrs
    cdef bint has_tsc_control
    cdef list msr_indices           # the MSRs that KVM lists, without those that it cannot read
    cdef dict new                   # _rarely_changed() of a new vCPU on this host; None: not read yet
    cdef int new_tsc_khz

    def __init__(self, int kvm_fd):
        cdef uint32_t[MSRS + 1] indices
        cdef int size = kvm_call(kvm_fd, KVM_CHECK_EXTENSION, <void *><size_t>KVM_CAP_XSAVE2)
        self.has_xsave2 = size > 0
        self.xsave_bytes = max(<size_t>max(size, 0), kvm_size(KVM_GET_XSAVE))
        self.has_sregs2 = kvm_call(kvm_fd, KVM_CHECK_EXTENSION, <void *><size_t>KVM_CAP_SREGS2) > 0
        self.has_xcrs = kvm_call(kvm_fd, KVM_CHECK_EXTENSION, <void *><size_t>KVM_CAP_XCRS) > 0
        self.has_tsc_control = kvm_call(kvm_fd, KVM_CHECK_EXTENSION, <void *><size_t>KVM_CAP_TSC_CONTROL) > 0
        indices[0] = MSRS
        _do(kvm_fd, KVM_GET_MSR_INDEX_LIST, indices, "KVM_GET_MSR_INDEX_LIST")
        self.msr_indices = [indices[1 + i] for i in range(indices[0])]

    def save_vcpu(self, int fd):
        """Read the state of a vCPU. It must not be in KVM_RUN, and KVM_RUN must have completed its last exit.

        :param fd: the vCPU's descriptor; borrowed
        :returns: each part as the bytes of its KVM structure, by its name in the KVM API
        :raises KvmError: KVM refused a part; ``what`` names it
        """
        state = {
            "mp_state": _get(fd, KVM_GET_MP_STATE, "KVM_GET_MP_STATE"),
            "regs": _get(fd, KVM_GET_REGS, "KVM_GET_REGS"),
        }
        if self.has_sregs2:
            state["sregs2"] = _get(fd, KVM_GET_SREGS2, "KVM_GET_SREGS2")
        else:
            state["sregs"] = _get(fd, KVM_GET_SREGS, "KVM_GET_SREGS")
        state["xsave"] = _get(
            fd, KVM_GET_XSAVE2 if self.has_xsave2 else KVM_GET_XSAVE, "KVM_GET_XSAVE", self.xsave_bytes)
        state["lapic"] = _get(fd, KVM_GET_LAPIC, "KVM_GET_LAPIC")
        state["tsc_khz"] = max(kvm_call(fd, KVM_GET_TSC_KHZ, NULL), 0)
        state["cpuid"] = self._cpuid(fd)
        state["realtime"], state["msrs"] = time_ns(), self._msrs(fd)
        state.update(self._rarely_changed(fd))
        return state

    cdef dict _rarely_changed(self, int fd):
        parts = {"debugregs": _get(fd, KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS")}
        if self.has_xcrs:
            parts["xcrs"] = _get(fd, KVM_GET_XCRS, "KVM_GET_XCRS")
        parts["vcpu_events"] = _get(fd, KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS")
        return parts

    cdef bytes _cpuid(self, int fd):
        cdef CpuidTable table
        table.header.nent = CPUID_ENTRIES
        table.header.padding = 0
        _do(fd, KVM_GET_CPUID2, &table, "KVM_GET_CPUID2")
        return (<char *>table.entries)[:40 * table.header.nent]

    cdef dict _msrs(self, int fd):
        cdef MsrBatch batch
        cdef int i, got
        cdef list indices = self.msr_indices
        while True:
            batch.header.nmsrs = len(indices)
            batch.header.pad = 0
            for i in range(len(indices)):
                batch.entries[i] = kvm_msr_entry(indices[i], 0, 0)
            got = _do(fd, KVM_GET_MSRS, &batch, "KVM_GET_MSRS")
            if got == len(indices):
                break
            # KVM lists this MSR but cannot read it: leave it out from now on.
            indices = indices[:got] + indices[got + 1:]
        self.msr_indices = indices
        return {batch.entries[i].index: batch.entries[i].data for i in range(got)}

    def restore_vcpu(self, int fd, dict state):
        """Write `state`, from ``save_vcpu``, to a new vCPU. Its TSC is advanced by the host's time since the save.

        :raises SnapshotError: a part is missing or has a different size on this host
        :raises KvmError: KVM refused a part; ``what`` names it
        """
        cdef CpuidTable table
        cdef bytes cpuid = state["cpuid"]
        if len(cpuid) % 40 or <size_t>len(cpuid) > sizeof(table.entries):
            raise SnapshotError("KVM_SET_CPUID2", f"has {len(cpuid)} bytes, not a list of 40-byte entries")
        table.header.nent = len(cpuid) // 40
        table.header.padding = 0
        memcpy(table.entries, <char *>cpuid, len(cpuid))
        _do(fd, KVM_SET_CPUID2, &table, "KVM_SET_CPUID2")
        if self.new is None:
            self.new_tsc_khz = kvm_call(fd, KVM_GET_TSC_KHZ, NULL)
            self.new = self._rarely_changed(fd)
        self._set_tsc_khz(fd, state["tsc_khz"])
        _set(fd, KVM_SET_MP_STATE, state["mp_state"], "KVM_SET_MP_STATE")
        _set(fd, KVM_SET_REGS, state["regs"], "KVM_SET_REGS")
        if "sregs2" in state:
            _set(fd, KVM_SET_SREGS2, state["sregs2"], "KVM_SET_SREGS2")
        else:
            _set(fd, KVM_SET_SREGS, state["sregs"], "KVM_SET_SREGS")
        _set(fd, KVM_SET_XSAVE, state["xsave"], "KVM_SET_XSAVE", self.xsave_bytes)
        # Each call loads the vCPU, which is most of its cost: skip the parts that have a new vCPU's values.
        if "xcrs" in state and state["xcrs"] != self.new["xcrs"]:
            _set(fd, KVM_SET_XCRS, state["xcrs"], "KVM_SET_XCRS")
        if state["debugregs"] != self.new["debugregs"]:
            _set(fd, KVM_SET_DEBUGREGS, state["debugregs"], "KVM_SET_DEBUGREGS")
        _set(fd, KVM_SET_LAPIC, state["lapic"], "KVM_SET_LAPIC")
        self._set_msrs(fd, state["msrs"], state.get("realtime", 0), state["tsc_khz"])
        if state["vcpu_events"] != self.new["vcpu_events"]:
            _set(fd, KVM_SET_VCPU_EVENTS, state["vcpu_events"], "KVM_SET_VCPU_EVENTS")
        # KVM_KVMCLOCK_CTRL keeps a guest's watchdog from taking the pause for a hang. EINVAL: kvm-clock is not in use.
        has_clock = state["msrs"].get(MSR_KVM_SYSTEM_TIME, 0) | state["msrs"].get(MSR_KVM_SYSTEM_TIME_NEW, 0)
        if has_clock & 1 and kvm_call(fd, KVM_KVMCLOCK_CTRL, NULL) < 0 and errno != EINVAL:
            raise KvmError(errno, "KVM_KVMCLOCK_CTRL")

    cdef int _set_tsc_khz(self, int fd, khz) except -1:
        cdef uint64_t wanted = khz
        cdef int here = self.new_tsc_khz
        if here <= 0 or wanted == 0 or abs(<int64_t>wanted - here) * 1000000 <= <int64_t>here * TSC_TOLERANCE_PPM:
            return 0
        if not self.has_tsc_control or kvm_call(fd, KVM_SET_TSC_KHZ, <void *>wanted) < 0:
            raise SnapshotError("TSC", f"ran at {wanted} kHz, this host's runs at {here} kHz and cannot be scaled")
        return 0

    cdef int _set_msrs(self, int fd, dict msrs, uint64_t then, tsc_khz) except -1:
        cdef MsrBatch batch
        cdef uint32_t count = 1
        cdef int done
        if len(msrs) >= MSRS:
            raise SnapshotError("KVM_SET_MSRS", f"has {len(msrs)} registers, at most {MSRS - 1} are allowed")
        for index, value in msrs.items():
            if index != MSR_IA32_TSC_DEADLINE and index != MSR_IA32_TSC:
                batch.entries[count] = kvm_msr_entry(index, 0, value)
                count += 1
        # Computed as late as possible: the guest's TSC loses the time until KVM_SET_MSRS.
        cycles = _passed_since(then) * tsc_khz // 1000000
        batch.entries[0] = kvm_msr_entry(MSR_IA32_TSC, 0, msrs.get(MSR_IA32_TSC, 0) + cycles & 0xFFFF_FFFF_FFFF_FFFF)
        if MSR_IA32_TSC_DEADLINE in msrs:
            # 0: the deadline has passed, but its interrupt may not be in a register yet. A deadline in the past raises
            # it.
            deadline = msrs[MSR_IA32_TSC_DEADLINE] or batch.entries[0].data
            batch.entries[count] = kvm_msr_entry(MSR_IA32_TSC_DEADLINE, 0, deadline)
            count += 1
        batch.header.nmsrs = count
        batch.header.pad = 0
        done = _do(fd, KVM_SET_MSRS, &batch, "KVM_SET_MSRS")
        if <uint32_t>done < count:
            raise KvmError(EINVAL, f"KVM_SET_MSRS {batch.entries[done].index:#x}")
        return 0

    def save_vm(self, int fd, *, bint timer):
        """Read the state of a VM's interrupt controllers and timer. Its vCPUs must be paused.

        :param fd: the VM's descriptor; borrowed
        :param timer: whether the VM has KVM's timer; if not, ``pit2`` is empty
        :raises KvmError: KVM refused a part; ``what`` names it
        """
        cdef kvm_irqchip *chip
        cdef bytes data
        cdef int i
        chips = []
        for i in range(IRQCHIPS):
            data = bytes(sizeof(kvm_irqchip))
            chip = <kvm_irqchip *>PyBytes_AS_STRING(data)
            chip.chip_id = i
            _do(fd, KVM_GET_IRQCHIP, chip, "KVM_GET_IRQCHIP")
            chips.append(data)
        return {
            "pit2": _get(fd, KVM_GET_PIT2, "KVM_GET_PIT2") if timer else b"",
            "irqchips": chips,
        }

    def get_clock(self, int fd):
        """Read kvm-clock together with the host's time of day.

        :returns: the bytes of ``struct kvm_clock_data``, with ``realtime`` set
        :raises KvmError: KVM refused
        """
        cdef kvm_clock_data data
        memset(&data, 0, sizeof(data))
        _do(fd, KVM_GET_CLOCK, &data, "KVM_GET_CLOCK")
        if not data.flags & KVM_CLOCK_REALTIME:
            (<uint64_t *>&data)[REALTIME] = time_ns()
        return (<char *>&data)[:sizeof(data)]

    def restore_vm(self, int fd, dict state):
        """Write `state`, from ``save_vm``, to a VM whose vCPUs have not run. It has KVM's timer if the saved VM had it.

        :raises SnapshotError: a part has the wrong size or number
        :raises KvmError: KVM refused a part; ``what`` names it
        """
        if len(state["irqchips"]) != IRQCHIPS:
            raise SnapshotError("KVM_SET_IRQCHIP", f"has {len(state['irqchips'])} chips, KVM takes {IRQCHIPS}")
        if state["pit2"] != b"":
            _set(fd, KVM_SET_PIT2, state["pit2"], "KVM_SET_PIT2")
        for chip in state["irqchips"]:
            _set(fd, KVM_SET_IRQCHIP, chip, "KVM_SET_IRQCHIP")
        _lower_lines(fd, state["irqchips"])

    def set_clock(self, int fd, clock):
        """Set kvm-clock to `clock`, from ``get_clock``, advanced by the time since then.

        :raises SnapshotError: `clock` has the wrong size
        :raises KvmError: KVM refused
        """
        cdef kvm_clock_data data
        if not isinstance(clock, bytes) or len(clock) != sizeof(data):
            raise SnapshotError("KVM_SET_CLOCK", f"KVM takes a structure of {sizeof(data)} bytes")
        memcpy(&data, <char *>clock, sizeof(data))
        data.flags &= KVM_CLOCK_REALTIME
        # KVM advances the clock itself only if it had read the host's time with it (KVM_CLOCK_REALTIME), which it does
        # only if the host's clock source is the TSC.
        if not data.flags:
            data.clock += <uint64_t>_passed_since((<uint64_t *>&data)[REALTIME])
        _do(fd, KVM_SET_CLOCK, &data, "KVM_SET_CLOCK")
