# SPDX-License-Identifier: Apache-2.0
"""What goes into a guest: scripts that a shell can parse, a program that runs, and real images.

That they boot is for tests/linux to say.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.images.test_cpio import read
from vmm import images
from vmm.config.vm import DEFAULT_EXIT_PORT
from vmm.images import apt, guest
from vmm.images.host import PullError
from vmm.images.initramfs import build_initramfs

SHELLS = ["dash", "bash --posix", "busybox sh"]


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shutil.which(shell.split()[0])])
@pytest.mark.parametrize("script", [guest.INIT, guest.ROOT_INIT, guest.POWEROFF, guest.BUSYBOX_PROFILE])
def test_scripts_parse(shell: str, script: str) -> None:
    done = subprocess.run([*shell.split(), "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


# The words that the kernel hands to init, for a command line: those it does not know come first.
ARGUMENTS = [
    ("console=ttyS0 quiet", [], []),
    ("console=ttyS0 nokaslr", ["nokaslr"], []),
    ("quiet -- -s", ["-s"], ["-s"]),
    ("nokaslr -- -s", ["nokaslr", "-s"], ["-s"]),
    ('nokaslr x -- sh -c "exit 3"', ["nokaslr", "x", "sh", "-c", "exit 3"], ["sh", "-c", "exit 3"]),
    ('-- "/a b" c', ["/a b", "c"], ["/a b", "c"]),
]


@pytest.mark.parametrize(("cmdline", "arguments", "session"), ARGUMENTS)
def test_session_is_what_stands_after_the_dashes(cmdline: str, arguments: list[str], session: list[str]) -> None:
    script = guest.ROOT_INIT
    begin = script.index('case " $cmdline " in\n*" -- "*)')
    part = script[begin : script.index("esac\n", begin) + 5]
    show = 'for word; do echo "$word"; done'
    done = subprocess.run(
        ["sh", "-c", f"cmdline=$CMDLINE\n{part}\n{show}", "init", *arguments],
        env={"CMDLINE": cmdline, "PATH": os.defpath}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == session


TABLES = {
    "gpt": (512, "label: gpt\nsize=1MiB, uuid=01234567-89AB-CDEF-0123-456789ABCDEF, name=one\nsize=1MiB\n"),
    "gpt, 4 KiB sectors": (4096, "label: gpt\nsize=1MiB\nsize=1MiB, uuid=01234567-89AB-CDEF-0123-456789ABCDEF\n"),
    "mbr": (512, "label: dos\nlabel-id: 0x89abcdef\nsize=1MiB\nsize=1MiB\n"),
}


@pytest.fixture(params=TABLES)
def partitions(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """A directory with the sys and dev of two partitions, and what sfdisk says their PARTUUIDs are."""
    sector, table = TABLES[request.param]
    disk, block = tmp_path / "dev/vda", tmp_path / "sys/block/vda"
    for directory in (disk.parent, block / "queue", tmp_path / "sys/class/block"):
        directory.mkdir(parents=True)
    disk.write_bytes(bytes(8 << 20))
    subprocess.run(["sfdisk", "--quiet", disk], input=table, text=True, check=True)
    (block / "queue/logical_block_size").write_text(f"{sector}\n")
    for number in (1, 2):
        (block / f"vda{number}").mkdir()
        (block / f"vda{number}/partition").write_text(f"{number}\n")
        (block / f"vda{number}/uevent").write_text(f"MAJOR=254\nPARTN={number}\nPARTNAME=name {number}\n")
        (tmp_path / f"sys/class/block/vda{number}").symlink_to(block / f"vda{number}")
    if request.param == "mbr":
        return tmp_path, ["89abcdef-01", "89abcdef-02"]
    said = [subprocess.run(["sfdisk", "--part-uuid", disk, str(n)], capture_output=True, text=True) for n in (1, 2)]
    if sector == 4096:  # the same header and table, where such a disk has them
        data = disk.read_bytes()
        disk.write_bytes(bytes(sector) + data[512:1024].ljust(sector, b"\0") + data[1024 : 1024 + (16 << 10)])
    return tmp_path, [done.stdout.strip() for done in said]


def _found(root: str, place: Path) -> str:
    # what the initramfs takes for it, by the busybox that it has
    begin = guest.INIT.index("# of a partition, as")
    script = guest.INIT[begin : guest.INIT.index("tries=0\n", begin)]
    for name in ("sys", "dev"):
        script = script.replace(f"/{name}/", f"{place}/{name}/")
    shell = [shutil.which("busybox") or "busybox", "sh", "-c", f'root="$1"\n{script}\nfound && echo "$device"', "init"]
    done = subprocess.run([*shell, root], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.strip().removeprefix(str(place))


def test_a_root_is_found_by_its_partition(partitions: tuple[Path, list[str]]) -> None:
    place, uuids = partitions
    for number, uuid in enumerate(uuids, start=1):
        assert _found(f"PARTUUID={uuid}", place) == _found(f"PARTUUID={uuid.swapcase()}", place) == f"/dev/vda{number}"
        assert _found(f"PARTLABEL=name {number}", place) == f"/dev/vda{number}"
    assert _found(f"PARTUUID={uuids[0]}/PARTNROFF=1", place) == "/dev/vda2"
    assert _found(f"PARTUUID={uuids[1]}/PARTNROFF=1", place) == ""
    assert _found("PARTUUID=89abcdef-03", place) == _found("PARTLABEL=name", place) == ""


def test_exit_program_runs_and_ends_with_1_where_it_may_not_use_ports() -> None:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path is closed to another user
        os.chmod(directory, 0o755)
        program = Path(directory, "exit")
        data = guest.session_files("h")["usr/lib/pyvmm/exit"]
        assert isinstance(data, bytes)
        program.write_bytes(data)
        program.chmod(0o755)
        user = {} if os.geteuid() else {"user": 65534, "group": 65534, "extra_groups": []}
        for arguments in ([], ["3"], ["255"], ["x"]):
            assert subprocess.run([program, *arguments], **user).returncode == 1  # type: ignore[call-overload]
    source = Path(guest.__file__).with_name("exit.c").read_text()
    assert f"EXIT_PORT = {DEFAULT_EXIT_PORT:#x}" in source


@pytest.fixture(scope="module")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that shares its packages with this host's own, so that they are fetched only once."""
    own = Path(images.cache_root(), "debs")
    with pytest.MonkeyPatch.context() as patch:
        shared = tmp_path_factory.mktemp("cache")
        own.mkdir(parents=True, exist_ok=True)
        (shared / "pyvmm").mkdir()
        (shared / "pyvmm/debs").symlink_to(own)
        patch.setenv("XDG_CACHE_HOME", str(shared))
        try:
            apt.package("linux-image-cloud-amd64")
            apt.package("busybox-static")
        except PullError as error:
            pytest.skip(f"no Debian packages here: {error}")
    return shared


@pytest.fixture
def shared_cache(debs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(debs))
    return debs


def test_initramfs_of_the_stock_kernel(shared_cache: Path) -> None:
    kernel = apt.package("linux-image-cloud-amd64").tree
    data = build_initramfs(
        kernel, ["virtio_mmio", "virtio_blk"], "#!/bin/sh\n", on_demand=["virtiofs"], files={"etc/x": "hello"}
    )
    entries = read(data)
    version = apt.kernel_of(kernel)[1]
    assert entries["init"].mode == stat.S_IFREG | 0o755
    assert entries["bin/busybox"].mode == stat.S_IFREG | 0o755
    assert entries["bin/sh"].data == b"/bin/busybox"
    assert entries["dev/console"].device == (5, 1)
    assert entries["etc/x"].data == b"hello"
    order = entries["lib/modules/order"].data.decode().split()
    assert order[-1] == f"{version}/virtio_blk.ko"
    assert order.index(f"{version}/virtio_ring.ko") < order.index(f"{version}/virtio.ko")
    assert not any("virtiofs" in name for name in order)
    for name in order:
        assert entries[f"lib/modules/{name}"].data.startswith(b"\x7fELF")
    depends = entries[f"lib/modules/{version}/modules.dep"].data.decode().splitlines()
    assert "virtiofs.ko: fuse.ko virtio.ko virtio_ring.ko" in {
        f"{line.split(':')[0]}: {' '.join(sorted(line.split(':')[1].split()))}" for line in depends
    }
    assert b"alias virtio:d00000002v* virtio_blk\n" in entries[f"lib/modules/{version}/modules.alias"].data
    assert data == build_initramfs(
        kernel, ["virtio_mmio", "virtio_blk"], "#!/bin/sh\n", on_demand=["virtiofs"], files={"etc/x": "hello"}
    )


def test_initramfs_without_modules(shared_cache: Path, tmp_path: Path) -> None:
    entries = read(build_initramfs(tmp_path, [], "#!/bin/sh\n"))
    assert entries["lib/modules/order"].data == b""


def test_busybox_image_is_a_sound_file_system(shared_cache: Path) -> None:
    image = images.pull("busybox", size=32 << 20)
    assert os.path.getsize(image.rootfs) == 32 << 20
    assert os.stat(image.rootfs).st_blocks * 512 < 16 << 20, "it is sparse"
    check = subprocess.run(["/sbin/e2fsck", "-fn", image.rootfs], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout

    def debugfs(request: str) -> str:
        return subprocess.run(
            ["/sbin/debugfs", "-R", request, image.rootfs], capture_output=True, text=True, check=True
        ).stdout

    assert debugfs("cat /usr/lib/pyvmm/init") == guest.ROOT_INIT
    assert 'Fast link dest: "/usr/lib/pyvmm/init"' in debugfs("stat /sbin/init")
    for path, mode in (("/bin/busybox", "0755"), ("/etc", "0755"), ("/root", "0700"), ("/tmp", "01777")):
        facts = debugfs(f"stat {path}").split()
        assert facts[facts.index("Mode:") + 1] == mode
        assert facts[facts.index("User:") + 1] == "0"
    assert read(Path(image.initrd).read_bytes())["init"].data.decode() == guest.INIT
    assert apt.kernel_of(apt.package("linux-image-cloud-amd64").tree)[0].read_bytes() == Path(image.kernel).read_bytes()
