# SPDX-License-Identifier: Apache-2.0
"""Load a kernel, an initrd and a command line: the one entry to the loaders."""

from __future__ import annotations

from boot import elf, layout, params
from boot.source import Source
from vmm.cmdline import Cmdline

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

    from boot.bzimage import Setup
    from vmm.memory import GuestMemory

    Path = str | os.PathLike[str]

# What people hand over by mistake, by the bytes it begins with.
_NOT_KERNELS = (
    (b"\x1f\x8b", "is compressed by gzip; unpack it first (gunzip)"),
    (b"\xfd7zXZ", "is compressed by xz; unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it first (unzstd)"),
    (b"\x02\x21\x4c\x18", "is compressed by lz4; unpack it first (unlz4)"),
    (b"\x04\x22\x4d\x18", "is compressed by lz4; unpack it first (unlz4)"),
    (b"BZh", "is compressed by bzip2; unpack it first (bunzip2)"),
    (b"070701", "is a cpio archive: an initrd, not a kernel"),
    (b"\x27\x05\x19\x56", "is a U-Boot image, not an x86-64 kernel"),
    (b"QFI\xfb", "is a qcow2 disk image, not a kernel"),
    (b"!<arch>", "is an archive (a Debian package?), not a kernel"),
    (b"#!", "is a script, not a kernel"),
)


class Kind:
    """What a kernel file is, told from its headers.

    :ivar kind: ``elf`` or ``bzimage``
    """

    __slots__ = ("_path", "_ring0", "kind")

    def __init__(self, source: Source, image: elf.Elf | Setup) -> None:
        self._path = source.path
        self.kind, self._ring0 = ("elf", image.ring0) if isinstance(image, elf.Elf) else ("bzimage", True)

    @property
    def needs_ring0(self) -> bool:
        """Whether this is a Linux, and no note in it says that its code runs in ring 3.

        An ELF file without such notes and Linux's is searched for Linux's banner, once.

        :raises ConfigError, HostError: when the file has gone since
        """
        if self._ring0 is None:
            with Source("kernel", self._path) as source:
                self._ring0 = elf.has_linux_banner(source)
        return self._ring0


class Loaded(Kind):
    """What was loaded where: all that the first vCPU's registers and the report to the user need.

    :ivar entry: guest physical address of the first instruction
    :ivar protocol: ``linux64``, with the zero page at ``layout.ZERO_PAGE``, or ``pvh``, with the start info at
        ``layout.PVH_START_INFO``
    :ivar kernel: address and bytes of guest memory that the kernel takes, from its first to its last byte
    :ivar initrd: address and bytes, (0, 0) without one
    :ivar unpacked: the method by which the host unpacked a bzImage, empty where it did not
    """

    __slots__ = ("entry", "initrd", "kernel", "protocol", "unpacked")

    def __init__(self, source: Source, image: elf.Elf | Setup) -> None:
        super().__init__(source, image)
        self.entry = 0
        self.protocol = ""
        self.kernel = (0, 0)
        self.initrd = (0, 0)
        self.unpacked = ""


def probe(kernel_path: Path) -> Kind:
    """Read the headers of a kernel file and tell what it is.

    :raises ConfigError: when no kernel that could be loaded is there
    :raises HostError: when the host fails to read it
    """
    with Source("kernel", kernel_path) as source:
        return Kind(source, _identify(source))


def load(
    memory: GuestMemory,
    kernel_path: Path,
    *,
    initrd_path: Path | None = None,
    cmdline: str = "",
    protocol: str = "auto",
    unpack: str = "auto",
) -> Loaded:
    """Load a kernel into fresh guest memory, and all that it expects there except firmware tables.

    Fresh, because memory that a kernel wants zero is not written. On an error guest memory may be half
    written; it is of no use then. ``VmConfig`` has checked that there is 1 MiB at least, and `protocol` and
    `unpack`.

    :param protocol: ``linux64``, ``pvh``, or ``auto``: PVH where an ELF file offers it, else 64-bit Linux
    :param unpack: whether the host unpacks a bzImage, which is faster: ``always``, ``never``, or ``auto``:
        where it can. A kernel unpacked by the host has no KASLR; it runs at the address it was linked at
    :raises ConfigError: when a file, the command line or their size cannot be; one line says what and where
    :raises HostError: when the host fails to read a file
    """
    with Source("kernel", kernel_path) as source:
        image = _identify(source)
        loaded = Loaded(source, image)
        if isinstance(image, elf.Elf):
            text = Cmdline(cmdline).encode()
            elf.check_room(image, memory, source.fail)
            pvh = protocol == "pvh" or (protocol == "auto" and image.pvh_entry is not None)
            taken = _enter(loaded, image, pvh, source)
            elf.load_file(image, source, memory)
            header, initrd_max = params.elf_setup_header(), layout.MMIO_HOLE - 1
        else:
            text = Cmdline(cmdline).encode(min(image.cmdline_size, layout.CMDLINE_END - layout.CMDLINE - 1))
            taken = _load_bzimage(image, source, memory, loaded, protocol, unpack)
            header, initrd_max = image.header, image.initrd_addr_max
    loaded.kernel = (taken[0][0], taken[-1][1] - taken[0][0])
    if initrd_path is not None:
        loaded.initrd = _load_initrd(initrd_path, memory, taken, initrd_max)
    memory.write(layout.CMDLINE, text)
    if loaded.protocol == "pvh":
        params.write_start_info(memory, initrd=loaded.initrd)
    else:
        page = params.zero_page(memory, header, load_address=loaded.kernel[0], initrd=loaded.initrd)
        memory.write(layout.ZERO_PAGE, page)
    return loaded


def _identify(source: Source) -> elf.Elf | Setup:
    head = source.read(0, min(0x240, source.size), "the head")
    if head.startswith(elf.MAGIC):
        return elf.read_file(source)
    for magic, problem in _NOT_KERNELS:
        if head.startswith(magic):
            raise source.fail(problem)
    if head[0x38:0x3C] == b"ARM\x64":
        raise source.fail("is an arm64 Image, not an x86-64 kernel")
    if head[0x30:0x35] == b"RISCV":
        raise source.fail("is a RISC-V Image, not an x86-64 kernel")
    from boot import bzimage

    if head[0x202:0x206] == bzimage.MAGIC:
        return bzimage.parse(source)
    if head.startswith(b"MZ"):
        raise source.fail("is an EFI program without a Linux setup header; give the kernel itself")
    if head[0x1FE:0x200] == b"\x55\xaa":
        raise source.fail("is a boot sector, a disk image or a kernel before boot protocol 2.00")
    raise source.fail("is neither an ELF kernel nor a bzImage")


def _enter(loaded: Loaded, image: elf.Elf, pvh: bool, source: Source) -> list[tuple[int, int]]:
    """Settle protocol and entry; return the stretches of memory that an ELF kernel takes, by rising address."""
    loaded.protocol = "pvh" if pvh else "linux64"
    loaded.entry = image.checked_pvh_entry(source.fail) if pvh else image.linux64_entry(source.fail)
    return [(segment.start, segment.end) for segment in image.segments]


def _load_bzimage(
    setup: Setup, source: Source, memory: GuestMemory, loaded: Loaded, protocol: str, unpack: str
) -> list[tuple[int, int]]:
    """Load the kernel, packed or unpacked; return the stretches of memory taken, by rising address."""
    from boot import bzimage, payload  # not needed for an ELF file

    address = bzimage.choose_address(setup, memory, source)
    method = payload.compression(source, setup)
    wanted = unpack == "always" or protocol == "pvh"
    if protocol == "pvh" and unpack == "never":
        raise source.fail("is a bzImage: the PVH protocol needs it unpacked, which unpack=never forbids")
    if wanted or unpack == "auto":
        try:
            image = payload.unpack(method, source, setup, memory)
        except payload.Unsupported as error:
            if wanted:
                raise source.fail(f"cannot be unpacked: {error}") from None
        else:
            loaded.unpacked = method
            return _enter(loaded, image, protocol == "pvh", source)
    source.read_into(setup.kernel, memory.slice(address, setup.size), "the kernel")  # it unpacks itself
    loaded.protocol = "linux64"
    loaded.entry = address + bzimage.ENTRY_64
    return [(address, address + setup.needs)]


def _load_initrd(path: Path, memory: GuestMemory, taken: list[tuple[int, int]], address_max: int) -> tuple[int, int]:
    """Read the initrd to the highest free place that the kernel allows; return its address and bytes.

    :param taken: what the kernel takes, by rising address
    :param address_max: the highest address its last byte may have
    """
    with Source("initrd", path) as source:
        limit = min(memory.regions[0].size, layout.MMIO_HOLE, address_max + 1)
        address = (limit - source.size) // layout.PAGE * layout.PAGE
        for start, end in reversed(taken):
            if address < end and start < address + source.size:
                address = (start - source.size) // layout.PAGE * layout.PAGE
        if address < layout.HIMEM:
            kernel = sum(end - start for start, end in taken)
            raise source.fail(
                f"does not fit: {source.size >> 10} KiB beside a kernel of {kernel >> 10} KiB"
                f" in memory below {limit >> 20} MiB"
            )
        source.read_into(0, memory.slice(address, source.size), "the initrd")
        return address, source.size
