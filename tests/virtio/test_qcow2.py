# SPDX-License-Identifier: Apache-2.0
"""qcow2 images behind a disk: what QEMU shows of them, and that they name no file that the user did not."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked import fork
from tests.virtio import blk_driver
from tests.virtio.test_blk import Vm, engine, image, part
from tests.waiting import until
from virtio.blk.device import Disk
from virtio.blk.qcow2 import Qcow2
from virtio.testing import Allocator
from vmm.errors import ConfigError
from vmm.memory import GuestMemory

__all__ = ["engine", "image"]


@pytest.fixture
def qcow2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # QEMU's coroutines do not go with the sanitizers
    if not shutil.which("qemu-img") or not shutil.which("qemu-storage-daemon"):
        pytest.skip("LAYER MISSING: qcow2: apt install qemu-utils qemu-system-common")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or (os.geteuid() and not shutil.which("fusermount3")):
        pytest.skip("LAYER MISSING: qcow2: no /dev/fuse for this user")
    path = tmp_path / "disk,with comma.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    return path


def raw_of(qcow2: Path) -> bytes:
    raw = qcow2.with_suffix(".raw")
    subprocess.run(["qemu-img", "check", "-q", qcow2], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", qcow2, raw], check=True)
    return raw.read_bytes()


def test_qcow2_read_and_written(qcow2: Path, ram: GuestMemory, allocator: Allocator, engine: str) -> None:
    with Qcow2(str(qcow2)) as image:
        vm = Vm(image.raw, ram, allocator, engine=engine, discard_block=image.cluster)
        vm.driver.bring_up()
        assert vm.device.capacity == (64 << 20) // 512
        assert vm.request(blk_driver.T_OUT, 100, vm.buffer(b"q" * 4096), vm.buffer(b"r" * 512)) == blk_driver.S_OK
        assert vm.request(blk_driver.T_OUT, 9999, vm.buffer(b"z" * 1024)) == blk_driver.S_OK
        assert vm.request(blk_driver.T_FLUSH) == blk_driver.S_OK
        # Clusters of 128 sectors: none in the first range, one in the second.
        for sector in (128, 256):
            assert vm.request(blk_driver.T_OUT, sector, vm.buffer(b"c" * 512)) == blk_driver.S_OK
        for sector, count in ((0, 64), (1, 300)):
            assert vm.request(blk_driver.T_DISCARD, 0, part(vm, sector, count)) == blk_driver.S_OK
        assert vm.read(128, 512) + vm.read(256, 512) == bytes(512) + b"c" * 512
        assert vm.request(blk_driver.T_WRITE_ZEROES, 0, part(vm, 10000, 1)) == blk_driver.S_OK
        assert vm.read(100, 4608) == b"q" * 4096 + b"r" * 512
        assert vm.read(9999, 1024) == b"z" * 512 + bytes(512)
        with pytest.raises(ConfigError, match="Is another process using the image"):
            Qcow2(str(qcow2))
        vm.close()
        raw = image.raw
    assert not os.path.exists(raw)
    data = raw_of(qcow2)
    assert data[100 * 512 :][:4608] == b"q" * 4096 + b"r" * 512
    assert data[9999 * 512 :][:1024] == b"z" * 512 + bytes(512)
    assert data.strip(b"\0").startswith(b"q") and data.rstrip(b"\0").endswith(b"z")


def test_qcow2_without_walls(qcow2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As somebody else than root has it."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with Qcow2(str(qcow2)) as image, open(image.raw, "r+b", buffering=0) as raw:
        os.pwrite(raw.fileno(), b"w" * 512, 512)
        raw_path = image.raw
    assert not os.path.exists(raw_path)
    assert raw_of(qcow2)[512:1024] == b"w" * 512


def test_qcow2_read_only(qcow2: Path) -> None:
    before = qcow2.read_bytes()
    with Qcow2(str(qcow2), read_only=True) as image:
        Disk(image.raw, read_only=True).close()
        # QEMU 7 refuses the write, QEMU 11 the opening.
        with pytest.raises(OSError), open(image.raw, "r+b", buffering=0) as file:
            file.write(b"x" * 512)
    assert qcow2.read_bytes() == before


def test_what_was_flushed_to_qcow2_survives_kill_9(qcow2: Path, tmp_path: Path) -> None:
    """The process that shows the image outlives the VMM long enough to end well."""
    heard, told = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            image = Qcow2(str(qcow2))
            fd = os.open(image.raw, os.O_RDWR)
            for n in range(200):
                os.pwrite(fd, n.to_bytes(4, "little") * 1024, n * 4096)
            os.fdatasync(fd)
            os.write(told, image.raw.encode())
            while True:
                os.pwrite(fd, os.urandom(4096), 300 * 4096)
        finally:
            os._exit(1)
    os.close(told)
    try:
        raw = os.read(heard, 4096)
    finally:
        os.close(heard)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert raw
    deadline = time.monotonic() + 30
    # Until the other process has written all and given its lock back.
    while subprocess.run(["qemu-img", "check", "-q", qcow2], stderr=subprocess.DEVNULL).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    data = raw_of(qcow2)
    assert data[: 200 * 4096] == b"".join(n.to_bytes(4, "little") * 1024 for n in range(200))


def test_what_watches_it_ends_where_nobody_reaps(qcow2: Path) -> None:
    """In a container whose process 1 is no init, what a killed VMM leaves becomes a zombie, which kill(2) finds."""
    code = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
from virtio.blk.qcow2 import Qcow2
if not os.fork():
    Qcow2({str(qcow2)!r})
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(-1, 0)
print("killed", flush=True)
while True:
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"killed\n"
            children = f"/proc/{process.pid}/task/{process.pid}/children"

            def states() -> set[str]:
                pids = Path(children).read_text().split()
                return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}

            until(lambda: states() == {"Z"})
        finally:
            process.kill()


def test_qcow2_that_is_none(image: Path, qcow2: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be opened: .*not in qcow2 format"):
        Qcow2(str(image))


def test_qcow2_without_the_program(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="is qcow2, which needs qemu-storage-daemon: apt install"):
        Qcow2(str(image))


# Files that an image names


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"secret!!" * 64 * 1024)
    return path


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_backing_file_that_nobody_named(qcow2: Path, secret: Path, compat: str) -> None:
    qemu_img("create", "-f", "qcow2", "-o", f"compat={compat}", "-b", secret, "-F", "raw", qcow2)
    for read_only in (False, True):
        with pytest.raises(ConfigError, match=r"has the backing file .*secret', which is not opened: backing=FILE"):
            Qcow2(str(qcow2), read_only=read_only)


@pytest.mark.parametrize("name", ['json:{"driver":"null-co"}', "nbd:127.0.0.1:10809", "fat:rw:/etc"])
def test_a_backing_files_name_that_is_no_file(qcow2: Path, name: str) -> None:
    qemu_img("create", "-f", "qcow2", "-u", "-b", name, "-F", "raw", qcow2, "1M")
    with pytest.raises(ConfigError, match="which is not opened"):
        Qcow2(str(qcow2))


def test_an_external_data_file(qcow2: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", qcow2, "1M")
    with pytest.raises(ConfigError, match="has its data in an external file, which is not opened"):
        Qcow2(str(qcow2))


def test_an_encrypted_image(qcow2: Path) -> None:
    with qcow2.open("r+b") as file:
        os.pwrite(file.fileno(), (2).to_bytes(4, "big"), 32)  # crypt_method: LUKS
    with pytest.raises(ConfigError, match="is encrypted by QEMU"):
        Qcow2(str(qcow2))


def test_the_backing_file_that_the_user_named_is_read_in_place_of_the_images(qcow2: Path, secret: Path) -> None:
    named = secret.with_name("named,with comma")
    named.write_bytes(b"n" * (1 << 20))
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", qcow2, "1M")
    before = named.read_bytes(), secret.read_bytes()
    with Qcow2(str(qcow2), backing_file=str(named)) as image, open(image.raw, "r+b", buffering=0) as raw:
        assert os.pread(raw.fileno(), 512, 1024) == b"n" * 512
        os.pwrite(raw.fileno(), b"w" * 512, 1024)
        assert os.pread(raw.fileno(), 1024, 1024) == b"w" * 512 + b"n" * 512
    assert (named.read_bytes(), secret.read_bytes()) == before
    with pytest.raises(ConfigError, match=r"is 'raw' by the image .*, not qcow2; say backing_format="):
        Qcow2(str(qcow2), backing_file=str(named), backing_format="qcow2")


def test_a_backing_file_of_qcow2_has_none_of_its_own(qcow2: Path, secret: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    qemu_img("create", "-f", "qcow2", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", qcow2)
    with Qcow2(str(qcow2), backing_file=str(base), backing_format="qcow2") as image:
        assert os.stat(image.raw).st_size == 1 << 20
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", base, "1M")
    with pytest.raises(ConfigError, match=f"disk {base}: has the backing file .*secret', which is not opened"):
        Qcow2(str(qcow2), backing_file=str(base), backing_format="qcow2")


def test_a_raw_backing_file_with_a_qcow2_header_is_raw(qcow2: Path, secret: Path, tmp_path: Path) -> None:
    # A guest wrote the header on its raw disk.
    base = tmp_path / "base"
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", base, "1M")
    qemu_img("create", "-f", "qcow2", "-u", "-b", base, "-F", "raw", qcow2, "1M")
    with Qcow2(str(qcow2), backing_file=str(base)) as image, open(image.raw, "rb") as raw:
        assert raw.read(4) == b"QFI\xfb"


def test_a_backing_file_for_an_image_without(qcow2: Path, secret: Path) -> None:
    with pytest.raises(ConfigError, match=r"is named, but the image .* has no backing file"):
        Qcow2(str(qcow2), backing_file=str(secret))


@pytest.mark.parametrize("walled", [True, False])
def test_a_header_that_changes_after_it_was_read(
    qcow2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walled: bool
) -> None:
    data = tmp_path / "data"
    if not walled:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={data}", qcow2, "1M")
    monkeypatch.setattr("virtio.blk.qcow2._cluster", lambda *_: 1 << 16)
    with pytest.raises(ConfigError, match=r"cannot be opened: .*|names another file"):
        Qcow2(str(qcow2))


@pytest.mark.parametrize("name", ["json:{}", "nbd:1.2.3.4:5", "fat:rw:x", "file:x"])
def test_a_prefix_in_a_files_name_is_part_of_the_name(
    qcow2: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    qcow2.rename(tmp_path / name)
    with Qcow2(name) as image:
        assert os.stat(image.raw).st_size == 64 << 20


def test_as_root_the_daemon_sees_the_image_alone_and_has_the_owners_rights(qcow2: Path, secret: Path) -> None:
    if os.geteuid():
        pytest.skip("LAYER MISSING: qcow2 as root")
    os.chown(qcow2, 1234, 1234)
    qcow2.chmod(0o600)
    fd = os.open(secret, os.O_RDONLY)
    os.set_inheritable(fd, True)
    with Qcow2(str(qcow2)) as image, open(image.raw, "r+b", buffering=0) as raw:
        os.pwrite(raw.fileno(), b"owned" * 100, 0)
        root = Path(image.raw).parent
        assert not (root / str(secret).lstrip("/")).exists()
        assert {each.name for each in root.iterdir() if each.is_file()} - {"file0", "raw"} == {
            each.name for each in root.iterdir() if each.name.startswith("pyvmm-qcow2-")
        }
        status = dict(
            line.split(":\t", 1) for line in (root.parent / "status").read_text().splitlines() if ":\t" in line
        )
        assert status["Uid"].split() == ["1234"] * 4
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 1 << 21, "CAP_SYS_ADMIN, to mount"
        opened = [os.readlink(each) for each in (root.parent / "fd").iterdir()]
        assert str(secret) not in opened
    os.close(fd)
    with Qcow2(str(qcow2), read_only=True) as image:
        mounts = (Path(image.raw).parents[1] / "mountinfo").read_text().splitlines()
        assert [line.split()[5].split(",")[0] for line in mounts if line.split()[4].endswith("/file0")] == ["ro"]


@pytest.mark.parametrize("at", range(0, 104, 4))
def test_a_damaged_header(qcow2: Path, at: int) -> None:
    """Any word of it all ones: one line, whoever says it."""
    content = bytearray(qcow2.read_bytes())
    content[at : at + 4] = b"\xff" * 4
    qcow2.write_bytes(content)
    with contextlib.suppress(ConfigError), Qcow2(str(qcow2)):
        pass
