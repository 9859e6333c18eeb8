# SPDX-License-Identifier: Apache-2.0
"""Images in directories: what is saved goes on elsewhere; what is damaged is refused; half of one is never seen."""

from __future__ import annotations

import copy
import errno
import fcntl
import itertools
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.fuzz.damaged_snapshots import Victim, sealed
from tests.killed import killed_at
from tests.kvm.guests import PATIENCE
from tests.kvm.test_fork import COUNTER
from vmm import DriveConfig, Image, Machine, undertaker
from vmm.api import ApiError, FatalError
from vmm.api.actions import Vmm
from vmm.api.diff import Diff
from vmm.api.snapshots import _memory_file, create, load, write_files
from vmm.api.types import BootSource, SnapshotCreate, SnapshotLoad, VmConfiguration
from vmm.config.devices import BalloonConfig, NetConfig, RateLimiterConfig, ShareConfig, VsockConfig
from vmm.config.vm import VmConfig
from vmm.durable import write_all, write_whole
from vmm.errors import ConfigError, HostError, SnapshotError
from vmm.machine import snapshot_file
from vmm.machine.snapshot_file import FORMAT, decode, encode

MakeGuest = Callable[..., Machine]
ROOT = Path(__file__).parents[2]


def _frozen(guest: MakeGuest, **settings: object) -> tuple[Image, int]:
    vm = guest(COUNTER, **settings)
    vm.start()
    while vm.memory.read(0x200004, 4) == bytes(4):
        time.sleep(0.001)
    vm.pause()
    count = int.from_bytes(vm.memory.read(0x200004, 4), "little")
    image = vm.freeze()
    vm.close()
    return image, count


def _goes_on(image: Image, count: int) -> None:
    with Machine(image=image) as vm:
        assert int.from_bytes(vm.memory.read(0x200004, 4), "little") == count
        vm.start()
        while int.from_bytes(vm.memory.read(0x200004, 4), "little") <= count:
            time.sleep(0.001)
        vm.memory.write(0x200000, b"\x05")
        stop = vm.wait(PATIENCE)
        assert stop is not None and stop.code == 5


def test_what_is_saved_goes_on_in_another_process(tmp_path: Path, guest: MakeGuest) -> None:
    image, count = _frozen(guest)
    image.save(str(tmp_path / "image"))
    _goes_on(Image.load(str(tmp_path / "image")), count)
    code = (
        "import sys, time; from vmm import Image, Machine; vm = Machine(image=Image.load(sys.argv[1])); vm.start();"
        "vm.memory.write(0x200000, b'\\x2a'); sys.exit(vm.wait(30).code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "image")], cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 42
    _goes_on(Image.load(str(tmp_path / "image")), count)


def test_it_is_its_owners_alone_and_has_holes(tmp_path: Path, guest: MakeGuest) -> None:
    image, _ = _frozen(guest, memory="256M")
    image.save(str(tmp_path / "image"))
    assert stat.S_IMODE((tmp_path / "image").stat().st_mode) == 0o700
    for name in ("state", "memory"):
        status = (tmp_path / "image" / name).stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_blocks * 512 < 1 << 20, "of 256 MiB the guest has touched little"
    assert sorted(os.listdir(tmp_path)) == ["guest.elf", "image"]


def test_ram_above_the_hole_and_what_was_written_since_a_freeze(tmp_path: Path, guest: MakeGuest) -> None:
    if os.sysconf("SC_PHYS_PAGES") * 4096 < 5 << 30:
        pytest.skip("LAYER MISSING: memory: 5 GiB of RAM")
    vm = guest(COUNTER, memory="4G")
    rng = random.Random(3)
    written = {gpa: rng.randbytes(64) for gpa in (1 << 20 << 5, (3 << 30) - 64, 4 << 30, (5 << 30) - 64, 0x12345000)}
    for gpa, data in written.items():
        vm.memory.write(gpa, data)
    vm.freeze()
    vm.memory.write(0x12345000, b"written since")
    vm.freeze().save(str(tmp_path / "image"))
    with Machine(image=Image.load(str(tmp_path / "image"))) as other:
        for gpa in written:
            assert other.memory.read(gpa, 64) == vm.memory.read(gpa, 64), hex(gpa)
        assert other.memory.read(0x12345000, 13) == b"written since"


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_load_beside_a_save_has_one_of_the_two_images(
    tmp_path: Path, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    image, count = _frozen(guest)
    image.save(str(tmp_path / "image"))
    calls = itertools.count()

    def opened(path: str) -> int:
        if next(calls) == at:
            image.save(str(tmp_path / "image"))
        return regular(path)

    regular = snapshot_file.open_regular
    monkeypatch.setattr(snapshot_file, "open_regular", opened)
    _goes_on(Image.load(str(tmp_path / "image")), count)
    shutil.rmtree(tmp_path / "image")
    with pytest.raises(HostError, match=r"read the snapshot .*image: No such file"):
        Image.load(str(tmp_path / "image"))
    (tmp_path / "image").mkdir()
    with pytest.raises(HostError, match=r"read the snapshot .*image: No such file"):
        Image.load(str(tmp_path / "image"))


def test_a_new_image_takes_the_place_of_an_old_one_and_of_nothing_else(tmp_path: Path, guest: MakeGuest) -> None:
    image, count = _frozen(guest)
    image.save(str(tmp_path / "image"))
    used = Image.load(str(tmp_path / "image"))
    image.save(str(tmp_path / "image"))
    _goes_on(Image.load(str(tmp_path / "image")), count)
    _goes_on(used, count)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    for place in ("home", "guest.elf"):
        with pytest.raises(ConfigError, match="exists and is not a snapshot"):
            image.save(str(tmp_path / place))
    assert (tmp_path / "home" / "letter").read_text() == "dear"
    with pytest.raises(HostError, match="No such file"):
        image.save(str(tmp_path / "none" / "image"))


def test_the_configuration_comes_back_as_it_was(tmp_path: Path, guest: MakeGuest) -> None:
    image, _ = _frozen(guest)
    limits = RateLimiterConfig((1, 2, 3), None)
    image.config = VmConfig(
        "k", drives=[DriveConfig("d", rate_limiter=limits, queues=2)], memory="4M", cpus=2,
        nets=[NetConfig("tap0", id="eth0")], vsock=VsockConfig(3, "v"), entropy=True,
    )  # fmt: skip
    back, mark = decode(encode(image, bytes(16)), "x")
    assert mark == bytes(16)
    assert encode(back, bytes(16)) == encode(image, bytes(16))
    (drive,) = back.config.drives
    assert (drive.path, drive.queues) == ("d", 2)
    assert drive.rate_limiter is not None and drive.rate_limiter.bandwidth == (1, 2, 3)


def test_what_was_changed_while_it_ran_is_in_the_image(tmp_path: Path, guest: MakeGuest) -> None:
    for name, size in (("a", 1 << 20), ("b", 2 << 20)):
        (tmp_path / name).write_bytes(bytes(size))
    limits = RateLimiterConfig(ops=(10, 5, 100))
    vm = guest(
        COUNTER, drives=[DriveConfig(tmp_path / "a", id="d", rate_limiter=limits)],
        balloon=BalloonConfig(1, stats_interval_s=1), shares=[ShareConfig("work", tmp_path)],
    )  # fmt: skip
    assert vm.freeze().config == vm.config
    assert vm.balloon is not None
    vm.blocks["d"].replace(str(tmp_path / "b"))
    vm.blocks["d"].set_rate_limit((1 << 20, 0, 100), (0, 0, 0))
    vm.shares["work"].set_rate_limit(None, (7, 0, 100))
    vm.balloon.set_amount(2)
    vm.balloon.set_polling_interval(9)
    vm.freeze().save(str(tmp_path / "image"))
    vm.close()
    with Machine(image=Image.load(str(tmp_path / "image"))) as copy:
        assert copy.blocks["d"].disk.path == str(tmp_path / "b") and copy.blocks["d"].capacity == 4096
        assert copy.blocks["d"].limiter.buckets == ((1 << 20, 0, 100), None)
        assert copy.shares["work"].limiter.buckets == (None, (7, 0, 100))
        assert copy.balloon is not None and copy.balloon.amount_mib == 2 and copy.balloon.stats_polling_interval_s == 9


def test_whatever_byte_is_changed_it_is_refused(tmp_path: Path, guest: MakeGuest) -> None:
    image, _ = _frozen(guest)
    good = encode(image, b"m" * 16)
    rng = random.Random(2)
    for at in [*range(40), *(rng.randrange(40, len(good)) for _ in range(300))]:
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        with pytest.raises(SnapshotError):
            decode(bytes(bad), "image")
    for size in [*range(64), *(rng.randrange(len(good)) for _ in range(50))]:
        with pytest.raises(SnapshotError):
            decode(good[:size], "image")


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Victim() as victim:
        yield victim


def test_no_document_does_more_than_be_refused(victim: Victim) -> None:
    # python -m tests.fuzz.fuzz_snapshots does so for as long as one likes.
    ends = [victim.try_(victim.damaged(seed)) for seed in range(100)]
    assert victim.try_(victim.good) == ""
    assert 40 < len([why for why in ends if why]) < 100


@pytest.mark.parametrize(
    ("where", "value", "why"),
    [
        # What the fuzzer found, and its kin.
        (("virtio", 4, "device", "actual"), 1 << 32, "virtio-balloon: the state is damaged: "),
        (
            ("config", "balloon", "free_page_reporting"),
            1 << 62,
            "is damaged: BalloonConfig: free_page_reporting must be True",
        ),
        (("config", "drives", 0, "path"), "a\nb", r"disk a\nb: "),
        (("config", "drives", 0, "queues"), True, "is damaged: DriveConfig: queues must be a whole number"),
        (("config", "drives", 0), "x", "is damaged: VmConfig: drives must be a list of DriveConfig"),
        (("config", "drives", 0, "rate_limiter", "bandwidth", 0), "x", "bandwidth must be three whole numbers"),
        (("config", "vsock"), b"\0" * 5000, "is damaged: VmConfig: vsock must be a VsockConfig or None"),
        (("config", "exit_port"), -1, "is damaged: exit_port -1: must be 0 to 65532"),
        (("config", "kvm"), "a\0b", r"kvm 'a\x00b': must have no NUL in it"),
        (("cmdline",), 5, "is damaged: snapshot: cmdline must be a string"),
        (("vcpus",), {}, "is damaged: snapshot: vcpus must be a list"),
        (("vcpus", 0, "regs"), b"", "KVM_SET_REGS: has 0 bytes, KVM takes"),
        (("vcpus", 0, "cpuid"), bytes(41), "KVM_SET_CPUID2: has 41 bytes, not a list"),
        (("board", "i8042", "keys"), 1 << 62, "is damaged: TypeError: memoryview: a bytes-like object is required"),
        (("board", "i8042", "output"), "x", "is damaged: ValueError: invalid literal for int()"),
        (("virtio", 1, "device", "nodes"), b"x", "virtio-fs0: the state is damaged: ValueError: nodes are cut short"),
        (("virtio", 1, "device", "slots"), 5, "virtio-fs0: the state is damaged: TypeError"),
        (("virtio", 5, "device", "messages"), [1 << 62], "virtio-console: the state is damaged: "),
    ],
    ids=str,
)
def test_damage_is_told_in_one_line(victim: Victim, where: tuple[Any, ...], value: object, why: str) -> None:
    document = copy.deepcopy(victim.document)
    part: Any = document
    for name in where[:-1]:
        part = part[name]
    part[where[-1]] = value
    said = victim.try_(sealed(victim.good[:32] + msgspec.msgpack.encode(document)))
    assert why in said


@pytest.mark.parametrize(
    ("api", "why"),
    [
        (b"", "was not made by the API: pyvmm run --restore takes it"),
        (b'{"x": ' + b"[" * 100_000, "recursion"),
    ],
    ids=["library", "depth"],
)
def test_the_api_refuses_by_one_line_what_it_did_not_write(
    tmp_path: Path, guest: MakeGuest, api: bytes, why: str
) -> None:
    image, _ = _frozen(guest)
    (tmp_path / "state").write_bytes(encode(image, bytes(16), api=api))
    body = SnapshotLoad(snapshot_path=str(tmp_path / "state"), mem_file_path=str(tmp_path / "memory"))
    with pytest.raises(FatalError, match=why):
        load(Vmm(), body)


def test_a_machine_that_has_just_ended_is_refused_by_the_api_too(tmp_path: Path, guest: MakeGuest) -> None:
    vm = guest(COUNTER)
    vm.start()
    vm.stop()
    body = SnapshotCreate(snapshot_path=str(tmp_path / "state"), mem_file_path=str(tmp_path / "memory"))
    with pytest.raises(ApiError, match=r"Create snapshot error: .* a machine that has ended cannot be frozen"):
        create(Vmm(), vm, body)


def test_a_path_with_a_nul_is_refused(guest: MakeGuest) -> None:
    image, _ = _frozen(guest)
    with pytest.raises(ConfigError, match="must have no NUL in it"):
        image.save("a\0b")
    with pytest.raises(SnapshotError, match="must have no NUL in it"):
        Image.load("a\0b")


def test_another_format_is_named(guest: MakeGuest) -> None:
    image, _ = _frozen(guest)
    data = bytearray(encode(image, b"m" * 16))
    data[8:12] = struct.pack("<I", FORMAT + 1)
    with pytest.raises(
        SnapshotError, match=r"x: was written by pyvmm 0\.1\.0 in format 3; pyvmm 0\.1\.0 reads format 2"
    ):
        decode(bytes(data), "x")


@pytest.mark.parametrize("number", [FORMAT, FORMAT + 1])
def test_a_document_that_is_nested_without_end_is_refused(number: int) -> None:
    header = struct.pack("<8sII16s", b"PYVMMIMG", number, 0, b"m" * 16)
    with pytest.raises(SnapshotError, match="recursion" if number == FORMAT else "written by another pyvmm in format"):
        decode(sealed(header + b"\x91" * 100_000), "x")


@pytest.mark.parametrize("name", ["state", "memory"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, guest: MakeGuest, name: str) -> None:
    image, _ = _frozen(guest)
    image.save(str(tmp_path / "image"))
    place = tmp_path / "image" / name
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        place.unlink()
        make(place)
        with pytest.raises(SnapshotError, match=f"{name}: is not a regular file"):
            Image.load(str(tmp_path / "image"))


def test_two_halves_of_different_images_are_refused(tmp_path: Path, guest: MakeGuest) -> None:
    image, _ = _frozen(guest)
    for name in ("one", "two"):
        image.save(str(tmp_path / name))
    shutil.copyfile(tmp_path / "two" / "memory", tmp_path / "one" / "memory")
    with pytest.raises(SnapshotError, match="memory and state belong to different snapshots"):
        Image.load(str(tmp_path / "one"))
    with (tmp_path / "two" / "memory").open("r+b") as file:
        file.truncate(12345)
    with pytest.raises(SnapshotError, match="memory has 12345 bytes"):
        Image.load(str(tmp_path / "two"))
    with pytest.raises(HostError, match="No such file"):
        Image.load(str(tmp_path / "three"))


def test_killed_at_any_system_call_of_a_save_the_old_image_is_whole_or_the_new(
    tmp_path: Path, guest: MakeGuest
) -> None:
    images = {}
    for name in ("old", "new"):
        image, count = _frozen(guest)
        while image.vcpus[0]["regs"] in images:  # it has counted as far as the other one
            image, count = _frozen(guest)
        image.save(str(tmp_path / name))
        images[_vcpus(tmp_path / name)] = name, count
    new, place = Image.load(str(tmp_path / "new")), tmp_path / "place"
    seen = []
    for step in itertools.count(1):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / "old", place)
        if not killed_at(step, lambda: new.save(str(place))):
            break
        name, _ = images[_vcpus(place)]
        seen.append(name)
        memory = (place / "memory").read_bytes()
        assert memory == (tmp_path / name / "memory").read_bytes()[:-16] + memory[-16:]
        for left in tmp_path.glob("place.*.new"):
            shutil.rmtree(left)
    assert seen == sorted(seen, reverse=True), "first the old one, then the new"
    assert seen.count("old") > 20 and seen.count("new") > 3, "it was killed at every system call"
    _goes_on(Image.load(str(place)), images[_vcpus(place)][1])


def test_the_next_save_removes_what_a_killed_one_has_left(tmp_path: Path, guest: MakeGuest) -> None:
    image, _ = _frozen(guest)
    room = tmp_path / "room"
    room.mkdir()
    place = room / "place"
    image.save(str(place))
    for step in (30, 45, 60):
        assert killed_at(step, lambda: image.save(str(place)))
    assert len([*room.glob("place.*.new")]) == 1, "each has removed what the one before it has left"
    foreign = [room / name for name in ("place.00000000.new.txt", "place.0000000.new", "other.00000000.new")]
    for each in foreign:
        each.mkdir()
    full, lively = room / "place.11111111.new", room / "place.22222222.new"
    full.mkdir()
    (full / "mine").touch()
    lively.mkdir()
    fd = os.open(lively, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    image.save(str(place))
    os.close(fd)
    assert {*room.iterdir()} == {place, *foreign, full, lively}
    image.save(str(place))
    assert {*room.iterdir()} == {place, *foreign, full}


def test_the_next_file_removes_what_a_killed_writer_has_left(tmp_path: Path) -> None:
    place = tmp_path / "memory"

    def write() -> None:
        write_whole((str(place), lambda fd: write_all(fd, b"whole")))

    steps = 0
    for step in itertools.count(1):
        if not killed_at(step, write):
            break
        steps = max(steps, len([*tmp_path.glob("*.new")]))
        assert not place.exists() or place.read_bytes() == b"whole"
    assert (steps, place.read_bytes(), [*tmp_path.iterdir()]) == (1, b"whole", [place])
    foreign = [tmp_path / name for name in ("memory.00000000.new.txt", "memory.0000000.new", "other.00000000.new")]
    directory, lively, link = (tmp_path / f"memory.{n * 8}.new" for n in "123")
    for each in (*foreign, lively):
        each.touch()
    directory.mkdir()
    link.symlink_to(place)
    with lively.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write()
        assert {*tmp_path.iterdir()} == {place, *foreign, directory, lively, link}
    write()
    assert {*tmp_path.iterdir()} == {place, *foreign, directory, link}


def test_a_file_system_without_locks_takes_images(
    tmp_path: Path, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    image, count = _frozen(guest)
    for _ in range(2):
        image.save(str(tmp_path / "place"))
    _goes_on(Image.load(str(tmp_path / "place")), count)


def _vcpus(place: Path) -> bytes:
    return bytes(Image.load(str(place)).vcpus[0]["regs"])


def test_killed_at_any_system_call_of_a_load_the_files_are_as_they_were(tmp_path: Path, guest: MakeGuest) -> None:
    image, _ = _frozen(guest)
    image.save(str(tmp_path / "image"))
    before = _files(tmp_path)
    steps = 1
    while killed_at(steps, lambda: Image.load(str(tmp_path / "image"))):
        steps += 1
        assert _files(tmp_path) == before
    assert steps > 8


def _files(place: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


@pytest.mark.parametrize("kind", ["Full", "Diff"])
def test_killed_at_any_system_call_the_apis_files_are_of_one_moment(
    tmp_path: Path, guest: MakeGuest, kind: str
) -> None:
    vm = guest(COUNTER)
    place = tmp_path / "place"
    place.mkdir()
    body = SnapshotCreate(snapshot_path=str(place / "snap"), mem_file_path=str(place / "mem"))

    def write(kind: str) -> None:
        state = encode(image, bytes(16))
        over = Diff.over(body.mem_file_path, vm.memory.size) if kind == "Diff" else None
        if over is None:
            write_files(body, image, state, None)
        else:
            over.write(body.snapshot_path, state, written, vm.memory.slice)
            over.wait()
            over.close()

    for number in range(2):
        vm.memory.write(0x300000, bytes((7 + number,)) * 8192)
        written = vm.memory.written()
        image = vm.freeze()
        image.cmdline = f"{number}"
        if not number:
            write("Full")

    def seen_now() -> str:
        state = (place / "snap").read_bytes()
        try:
            _memory_file(body.mem_file_path, 4 << 20)
        except ApiError as error:
            assert "has half of a Diff" in str(error)
            return "refused"
        page = (place / "mem").read_bytes()[0x300000 : 0x300000 + 8192]
        assert page in (b"\7" * 8192, b"\10" * 8192)
        return f"state {decode(state, 'x')[0].cmdline} memory {page[0] - 7}"

    before = _files(place)
    seen = []
    for step in itertools.count(1):
        for path in place.iterdir():
            path.unlink()
        for path, data in before.items():
            path.write_bytes(data or b"")
        if not killed_at(step, lambda: write(kind)):
            break
        seen.append(seen_now())
    assert seen[0] == "state 0 memory 0" and seen_now() == "state 1 memory 1"
    # The two names of a Full one cannot be changed in one step. A Diff is synced by a thread beside these steps, so how
    # many there are differs from run to run.
    between = "refused" if kind == "Diff" else "state 1 memory 0"
    assert set(seen) <= {"state 0 memory 0", between, "state 1 memory 1"}
    assert len(seen) > 10


@pytest.fixture
def api(tmp_path: Path, guest: MakeGuest) -> Iterator[tuple[Machine, Callable[..., None]]]:
    """A machine with a full snapshot, and what takes another one of it: a Diff into the same files, unless told."""
    vm = guest(COUNTER, track_dirty_pages=True)
    names = {"snapshot_path": str(tmp_path / "snap"), "mem_file_path": str(tmp_path / "mem")}
    shown = VmConfiguration(boot_source=BootSource(kernel_image_path="guest"))
    vmm: Any = SimpleNamespace(unsaved=[], whole=shown, metrics=SimpleNamespace(store=lambda *_: None))

    def take(kind: str = "Diff", **other: str) -> None:
        create(vmm, vm, SnapshotCreate(**{**names, **other}, snapshot_type=kind))  # type: ignore[arg-type]

    vm.memory.write(0x300000, b"\7" * 8192)
    take("Full")
    yield vm, take
    undertaker.wait()


def _is_whole(vm: Machine, path: Path) -> bool:
    _memory_file(str(path), vm.memory.size)
    return path.read_bytes() == vm.memory.read(0, vm.memory.size)


@pytest.mark.parametrize("kind", ["Full", "Diff"])
@pytest.mark.parametrize("name", ["snapshot_path", "mem_file_path"])
def test_a_snapshot_that_failed_leaves_its_pages_to_the_next_diff(
    tmp_path: Path, api: tuple[Machine, Callable[..., None]], kind: str, name: str
) -> None:
    vm, take = api
    for number in range(3):
        vm.memory.write(0x300000 + 8192 * number, bytes((number + 1,)) * 8193)
        with pytest.raises(ApiError, match="No such file"):
            take(kind, **{name: str(tmp_path / "missing" / "file")})
    vm.memory.write(0x380000, b"last")
    take()
    assert _is_whole(vm, tmp_path / "mem")


def test_what_the_host_refused_beside_the_files_is_no_fault_of_theirs(
    api: tuple[Machine, Callable[..., None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, take = api

    def none_left(self: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(type(vm.memory), "freeze", none_left)
    with pytest.raises(ApiError, match=r"Cannot save the microVM state: freeze guest memory: Too many open files$"):
        take("Full")


def test_half_of_a_diff_is_refused_until_a_whole_one_is_there(
    tmp_path: Path, api: tuple[Machine, Callable[..., None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, take = api
    for at in (0x310000, 0x330000):
        vm.memory.write(at, b"\1" * 4096)
    with monkeypatch.context() as patch:
        full = iter(range(1))  # one of the two pages; then the disk is full

        def write(fd: int, data: memoryview, offset: int = 0) -> None:
            if next(full, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_all(fd, data, offset)

        patch.setattr("vmm.api.diff.write_all", write)
        with pytest.raises(ApiError, match="memory backing file: No space left"):
            take()
    with pytest.raises(ApiError, match="has half of a Diff"):
        _is_whole(vm, tmp_path / "mem")
    # Whoever takes the next one into it may know nothing of the one before, as after a crash.
    with Machine(image=vm.freeze()) as other:
        other.memory.write(0x350000, b"\2" * 4096)
        body = SnapshotCreate(snapshot_path=str(tmp_path / "snap"), mem_file_path=str(tmp_path / "mem"))
        over = Diff.over(body.mem_file_path, other.memory.size)
        assert over is not None
        over.write(body.snapshot_path, b"state", [(0x350000, 4096)], other.memory.slice)
        over.wait()
        over.close()
        assert _is_whole(other, tmp_path / "mem")


def test_half_of_a_diff_is_refused_by_whatever_loads_it(
    tmp_path: Path, api: tuple[Machine, Callable[..., None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # `pyvmm ctl snapshot --diff DIR` writes what `pyvmm run --restore DIR` and Image.load take.
    vm, take = api
    names = {"snapshot_path": str(tmp_path / "image" / "state"), "mem_file_path": str(tmp_path / "image" / "memory")}
    (tmp_path / "image").mkdir()
    take("Full", **names)
    assert Image.load(str(tmp_path / "image")).config == vm.config
    vm.memory.write(0x310000, b"\1" * 4096)
    with monkeypatch.context() as patch:
        patch.setattr("vmm.api.diff.write_all", lambda *_: os.pread(-1, 1, 0))
        with pytest.raises(ApiError):
            take(**names)
    with pytest.raises(SnapshotError, match=r"image: memory has half of a Diff, whose writer was killed$"):
        Image.load(str(tmp_path / "image"))
    take(**names)
    assert Image.load(str(tmp_path / "image")).config == vm.config


@pytest.mark.parametrize("snap", ["snap", "other"])
def test_no_page_of_a_diff_is_written_before_its_mark_is_on_the_disk(
    tmp_path: Path, api: tuple[Machine, Callable[..., None]], monkeypatch: pytest.MonkeyPatch, snap: str
) -> None:
    vm, take = api
    done: list[str] = []
    names: dict[int, str] = {}

    def log(call: str) -> None:
        function = getattr(os, call)

        def logged(what: Any, *rest: Any) -> Any:
            path = what
            if isinstance(what, int):
                if threading.current_thread() is threading.main_thread():  # others have a filter
                    names[what] = os.readlink(f"/proc/self/fd/{what}")
                path = names[what]
            done.append(f"{call} {Path(path).name.partition('.')[0]}")
            return function(what, *rest)

        monkeypatch.setattr(os, call, logged)

    for call in ("fsync", "fdatasync", "pwrite", "rename", "setxattr", "removexattr"):
        log(call)
    for at in (0x310000, 0x330000):
        vm.memory.write(at, b"\1" * 4096)
    take(snapshot_path=str(tmp_path / snap))
    undertaker.wait()

    def beside(calls: list[str]) -> list[str]:
        # With the sync of the pages somewhere among them, on another thread.
        return sorted([*calls, "fsync mem"], key=done[4:].index)

    if snap == "snap":  # takes the new state in place
        assert done == [
            "setxattr mem", "fsync mem", "pwrite mem", "pwrite mem", *beside(["pwrite snap", "fsync snap"]),
            "removexattr mem", "fsync mem",
        ]  # fmt: skip
    else:
        directory = tmp_path.name.partition(".")[0]
        assert done == [
            "setxattr mem", "fsync mem", "pwrite mem", "pwrite mem",
            *beside(["pwrite other", "fsync other", "rename other", f"fsync {directory}"]), "removexattr mem",
            "fsync mem",
        ]  # fmt: skip
    assert _is_whole(vm, tmp_path / "mem")


def test_a_diff_has_what_was_given_back_since(tmp_path: Path, api: tuple[Machine, Callable[..., None]]) -> None:
    # By a balloon, or by a guest that reports what it does not use. As holes, where the file system has them.
    vm, take = api
    part = vm.memory.slice(0x300000, 0x40000)
    part[:] = b"\7" * len(part)
    take()
    room = os.stat(tmp_path / "mem").st_blocks
    vm.memory.discard(part)
    vm.memory.write(0x302000, b"\1")
    take()
    assert _is_whole(vm, tmp_path / "mem")
    assert os.stat(tmp_path / "mem").st_blocks < room
    vm.memory.discard(part)
    take()
    assert _is_whole(vm, tmp_path / "mem")


def test_a_diff_into_a_new_file_has_all_that_changed_and_nothing_else_but_holes(
    tmp_path: Path, api: tuple[Machine, Callable[..., None]]
) -> None:
    # As a client lays it over the snapshot before: what is a hole there is left as it was.
    vm, take = api
    at, size = 0x300000, 0x20000
    vm.memory.write(at, b"\7" * 2 * size)
    take()
    vm.memory.write(at, bytes(8192))
    vm.memory.discard(vm.memory.slice(at + size, size))
    vm.memory.write(0x200000, b"x")
    take(mem_file_path=str(tmp_path / "diff"), snapshot_path=str(tmp_path / "snap2"))
    assert os.stat(tmp_path / "diff").st_blocks * 512 < 4 * size
    with open(tmp_path / "diff", "rb") as diff, open(tmp_path / "mem", "r+b") as base:
        end = 0
        while True:
            try:
                start = os.lseek(diff.fileno(), end, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(diff.fileno(), start, os.SEEK_HOLE)
            os.pwrite(base.fileno(), os.pread(diff.fileno(), end - start, start), start)
    assert _is_whole(vm, tmp_path / "mem")


def test_a_longer_state_gives_way_to_a_shorter_one(tmp_path: Path, api: tuple[Machine, Callable[..., None]]) -> None:
    vm, take = api
    state = (tmp_path / "snap").read_bytes()
    (tmp_path / "snap").write_bytes(state * 2)
    take()
    assert decode((tmp_path / "snap").read_bytes(), "snap")[0].cmdline == vm.cmdline
    (tmp_path / "snap").unlink()
    (tmp_path / "snap").mkdir()
    with pytest.raises(ApiError, match="snapshot backing file: Is a directory"):
        take()
    assert _is_whole(vm, tmp_path / "mem")


def _pyvmm(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmm", *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )


def test_the_commands(tmp_path: Path, guest: MakeGuest) -> None:
    (tmp_path / "kernel").write_bytes(Path(guest(COUNTER).config.kernel).read_bytes())
    (tmp_path / "vm.json").write_text(
        '{"boot-source": {"kernel_image_path": "%s"}, "drives": [],'
        '"machine-config": {"vcpu_count": 1, "mem_size_mib": 16}, "pyvmm": {"exit_port": 244}}' % (tmp_path / "kernel")
    )
    socket, other = str(tmp_path / "a.sock"), str(tmp_path / "b.sock")
    serve = [sys.executable, "-m", "vmm", "serve", "--api-sock"]
    processes = [
        subprocess.Popen([*serve, socket, "--config-file", str(tmp_path / "vm.json")], cwd=ROOT),
        subprocess.Popen([*serve, other], cwd=ROOT),
    ]
    try:
        for path in (socket, other):
            end = time.monotonic() + PATIENCE
            while _pyvmm("ctl", "--api-sock", path, "status").returncode:
                assert time.monotonic() < end
                time.sleep(0.05)
        done = _pyvmm("ctl", "--api-sock", socket, "snapshot", str(tmp_path / "image"))
        assert done.returncode == 0, done.stderr
        assert "Running" in _pyvmm("ctl", "--api-sock", socket, "status").stdout
        done = _pyvmm("ctl", "--api-sock", other, "restore", str(tmp_path / "image"), "--paused")
        assert done.returncode == 0, done.stderr
        assert "Paused" in _pyvmm("ctl", "--api-sock", other, "status").stdout
    finally:
        for process in processes:
            process.terminate()
            process.wait(PATIENCE)
    image = Image.load(str(tmp_path / "image"))
    with Machine(image=image) as vm:  # let the guest end itself, by what it looks at
        vm.memory.write(0x200000, b"\x07")
        vm.freeze().save(str(tmp_path / "ending"))
    done = _pyvmm("run", "--restore", str(tmp_path / "ending"), "--console", "none")
    assert done.returncode == 7, done.stderr
    for words, message in (
        (["run", "--restore", str(tmp_path / "none")], "No such file or directory"),
        (["run", "--restore", str(tmp_path)], "No such file or directory"),
        (["run", "--restore", str(tmp_path / "image"), "--memory", "1G"], "--memory cannot change it"),
        (["run", "--restore", str(tmp_path / "image"), "vmlinux"], "vmlinux cannot change it"),
        (["run"], "KERNEL: is missing"),
    ):
        done = _pyvmm(*words)
        assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path, guest: MakeGuest) -> None:
    image, count = _frozen(guest)
    (tmp_path / "link").symlink_to("first")
    for _ in range(2):
        image.save(str(tmp_path / "link"))
        _goes_on(Image.load(str(tmp_path / "first")), count)
    assert sorted(os.listdir(tmp_path)) == ["first", "guest.elf", "link"] and (tmp_path / "link").is_symlink()
    (tmp_path / "file").symlink_to("target")
    for text in (b"1", b"2"):
        # mypy infers no type for a lambda's default.
        write_whole((str(tmp_path / "file"), lambda fd, text=text: write_all(fd, text)))  # type: ignore[misc]
        assert (tmp_path / "target").read_bytes() == text and (tmp_path / "file").is_symlink()


def test_no_device_is_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    for name, number in (("fifo", errno.EINVAL), ("link", errno.EINVAL), ("directory", errno.EISDIR)):
        with pytest.raises(OSError) as caught:
            write_whole((str(tmp_path / "new"), lambda fd: None), (str(tmp_path / name), lambda fd: None))
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / name))
    assert (tmp_path / "fifo").is_fifo() and not (tmp_path / "new").exists()
