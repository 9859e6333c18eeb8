# SPDX-License-Identifier: Apache-2.0
"""Layers become one tree: as umoci unpacks them, and whatever is in them, no file of the host is reached."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images.layouts import Made, directory, entry, hardlink, layer, symlink
from vmm.images import layers, reference, sources, squashfs
from vmm.images.host import PullError, silent


def merged(*tars: bytes, limit: int = 1 << 20) -> layers.Tree:
    tree = layers.Tree(limit)
    for number, tar in enumerate(tars):
        file = tempfile.TemporaryFile()  # the tree reads it later
        file.write(tar)
        file.seek(0)
        tree.add(f"layer {number}", file, len(tar))
    return tree


def saved(tmp_path: Path, data: bytes) -> reference.Name:
    """`data` as a file that is said to be of `docker save`."""
    (tmp_path / "saved.tar").write_bytes(data)
    name = reference.parse(f"docker-archive:{tmp_path}/saved.tar")
    assert name is not None
    return name


def names(tree: layers.Tree) -> list[str]:
    return [path for path, _ in tree.walk()]


def facts(top: Path) -> dict[str, Any]:
    """All that a tree of files is, but times of directories; two names of one file are told from two files."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for where, dirs, files in os.walk(top):
        for name in (*sorted(dirs), *sorted(files)):
            path = os.path.join(where, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content: object = None
            attributes = os.listxattr(path, follow_symlinks=False)
            if kind == stat.S_IFLNK:
                content = os.readlink(path)
            elif kind == stat.S_IFREG:
                content = Path(path).read_bytes()
            inner = os.path.relpath(path, top)
            found[inner] = (
                oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, content,
                None if kind == stat.S_IFDIR else int(status.st_mtime),
                {key: os.getxattr(path, key, follow_symlinks=False) for key in sorted(attributes)},
            )  # fmt: skip
    for inner in sorted(found):
        status = os.lstat(top / inner)
        if stat.S_ISREG(status.st_mode):
            found[inner] += (first.setdefault(status.st_ino, inner),)
    return found


LOWER = layer(
    directory("./"), directory("usr/"), directory("usr/lib"), symlink("lib", "usr/lib"), directory("etc", mode=0o700),
    entry("etc/passwd", b"root:x:0:0::/:/bin/sh\n", mtime=1234567), entry("etc/gone", b"x"), entry("etc/both", b"1"),
    hardlink("etc/both2", "etc/both"), entry("etc/moved", b"inode"), hardlink("etc/stays", "etc/moved"),
    directory("opaque"), entry("opaque/old", b"x"), directory("opaque/sub"), entry("opaque/sub/old", b"x"),
    directory("was-dir"), entry("was-dir/in", b"x"), entry("was-file", b"x"), symlink("was-link", "etc"),
    entry("bin/su", b"su", mode=0o4755, uid=5, gid=7), entry("tmp/sticky", type=tarfile.DIRTYPE, mode=0o1777),
    entry("long/" + "n" * 120 + "/" + "m" * 200, b"long"), entry("big", bytes(range(256)) * 5000),
    entry("fifo", type=tarfile.FIFOTYPE), symlink("dangling", "/nowhere/x"), entry("käse", "grün".encode()),
    entry("attr", b"a", pax_headers={"SCHILY.xattr.user.a": "b", "SCHILY.xattr.user.raw": "\udcff\udc80z"}),
)  # fmt: skip
UPPER = layer(
    entry("etc/.wh.gone"), entry("lib/added", b"in usr/lib"), hardlink("usr/lib/passwd", "etc/passwd"),
    entry("opaque/.wh..wh..opq"), entry("opaque/new", b"n"), entry("etc/.wh.moved"), entry("etc/both", b"other"),
    entry("was-dir", b"file now"), directory("was-file"), entry("was-file/in", b"x"), directory("was-link"),
    entry(".wh.nosuch"), entry("etc/none/.wh.nosuch"), directory("etc", mode=0o755),
)  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="owners are unpacked by root")
def test_tree_is_what_umoci_unpacks(tmp_path: Path) -> None:
    device = layer(entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666))
    home = Made([LOWER, device, UPPER]).write(tmp_path / "layout")
    image = tmp_path / "image"
    squashfs.write(merged(LOWER, device, UPPER, limit=1 << 22), image, silent)
    umoci = ["umoci", "unpack", "--image", f"{home}:latest", str(tmp_path / "bundle")]
    subprocess.run(umoci, check=True, capture_output=True)
    subprocess.run(["unsquashfs", "-d", tmp_path / "ours", image], check=True, capture_output=True)
    theirs, ours = facts(tmp_path / "bundle/rootfs"), facts(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, fact in theirs.items():
        assert ours[name] == fact, name


def test_whiteout_hides_lower_layers_alone() -> None:
    tree = merged(layer(entry("a/x"), entry("a/y")), layer(entry("a/y", b"new"), entry("a/.wh..wh..opq"), entry("a/z")))
    assert names(tree) == ["a", "a/y", "a/z"]
    tree = merged(layer(entry("d/old")), layer(entry("d/new"), entry(".wh.d")))
    assert names(tree) == ["d", "d/new"]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([entry("../etc/passwd", b"x")], "the name ../etc/passwd contains .."),
        ([entry("a/../../x", b"x")], "contains .."),
        ([entry("a"), hardlink("b", "../../etc/shadow")], "contains .."),
        ([hardlink("b", "/etc/shadow")], "b is a hard link to /etc/shadow, which is not a file in it"),
        ([directory("d"), hardlink("b", "d")], "which is not a file in it"),
        ([symlink("l", "l"), entry("l/x", b"")], "more than 40 symbolic links"),
        ([entry("f"), entry("f/x")], "f is not a directory, but has files in it"),
        ([entry("f", mode=0o644, uid=1 << 32)], "has the owner 4294967296:0"),
        ([entry("n" * 256)], "cannot be a file name"),
        ([entry("p", type=b"9")], "p has an unknown file type: b'9'"),
        ([entry("c", type=tarfile.CHRTYPE, devmajor=1 << 13)], "has the device number 8192:0"),
        ([entry("s", type=tarfile.SYMTYPE, linkname="")], "is a symbolic link to an invalid name"),
        ([entry("big", bytes(1 << 20)), entry("more", b"x")], "its files are larger than 1 MiB"),
    ],
)
def test_what_cannot_be_is_refused_by_one_line(entries: list[tuple[tarfile.TarInfo, bytes]], problem: str) -> None:
    with pytest.raises(PullError) as caught:
        merged(layer(*entries))
    assert problem in str(caught.value)
    assert str(caught.value).startswith("layer 0: ")
    assert "\n" not in str(caught.value)


def test_links_that_leave_stay_inside() -> None:
    # as a process whose root the tree is would follow them
    tree = merged(layer(symlink("out", "../../../.."), symlink("abs", "/etc"), entry("out/tmp/x"), entry("abs/y")))
    assert {"tmp/x", "etc/y"} < set(names(tree))


def test_names_with_slashes_in_front_are_inside() -> None:
    assert names(merged(layer(entry("/etc/x"), entry("./a//b")))) == ["a", "a/b", "etc", "etc/x"]


@pytest.mark.parametrize("cut", [100, 700, 1100, 1536, 1700])
def test_truncated_tar_is_no_image(cut: int) -> None:
    # headers at 0 and 1536
    whole = layer(entry("a", b"x" * 600), entry("b", b"y" * 600))
    with pytest.raises(PullError, match="layer 0"):
        merged(whole[:cut] if cut != 1536 else whole[:cut] + b"\xff" * 512 + whole[2048:])


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
@pytest.mark.parametrize("size", [1 << 33, (1 << 20) + 1, -512])
def test_endless_header_is_not_read(kind: bytes, size: int, tmp_path: Path) -> None:
    """Of a layer with several GiB of it, compressed to nothing, none comes into memory."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(PullError, match=f"layer 0: an extended header of {size} bytes"):
        merged(data)
    with pytest.raises(PullError, match=f"saved.tar: an extended header of {size} bytes"):
        sources.archive(saved(tmp_path, data))


def test_an_archive_does_not_end_where_a_header_is_damaged(tmp_path: Path) -> None:
    whole = layer(entry("a", b"x"), entry("b", b"y"))
    assert names(merged(whole[:2048])) == ["a", "b"], "zeros at its end may be missing"
    for damaged in (whole[:1024] + b"\xff" * 512 + whole[1536:], whole[:1024] + b"b"):
        with pytest.raises(PullError, match="layer 0 is not a valid tar archive"):
            merged(damaged)
        with pytest.raises(PullError, match=r"saved\.tar is not an archive of `docker save`"):
            sources.archive(saved(tmp_path, damaged))


def test_headers_of_headers_are_one_line(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    data = (info.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * 2000
    with pytest.raises(PullError, match="layer 0 is not a valid tar archive"):
        merged(data)
    with pytest.raises(PullError, match=r"saved\.tar is not an archive of `docker save`"):
        sources.archive(saved(tmp_path, data))


def test_number_of_files_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_ENTRIES", 3)
    with pytest.raises(PullError, match="more than 3 files"):
        merged(layer(*(entry(f"f{i}") for i in range(4))))
    with pytest.raises(PullError, match="more than 3 files"):  # directories that no entry has are made, too
        merged(layer(entry("a/b/c/d")))


def test_links_that_take_long_count_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_ENTRIES", 1000)
    far = [directory("x"), symlink("far", "x/../" * 800)]
    assert len(names(merged(layer(*far, *(entry(f"far/{number}") for number in range(60)))))) == 62
    with pytest.raises(PullError, match="the image has more than 1000 files"):
        merged(layer(*far, *(entry(f"far/{number}") for number in range(70))))


def test_names_that_are_long_by_links_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "a/" * 500
    entries = [entry(deep + "b"), symlink("one", deep), entry("one/" + deep + "b"), symlink("two", "one/" + deep)]
    tree = merged(layer(*entries, *(entry(f"two/{number}") for number in range(500))))
    assert max(map(len, names(tree))) == 2003
    monkeypatch.setattr(layers, "MAX_ENTRIES", 1 << 13)
    assert len(names(tree)) == 1504
    monkeypatch.setattr(layers, "MAX_ENTRIES", 1 << 12)
    with pytest.raises(PullError, match=r"^the image has names of more than 1048576 bytes$"):
        names(tree)


def extended(kind: bytes, data: bytes) -> bytes:
    """An extended header by itself, for the member that follows."""
    head = tarfile.TarInfo("more")
    head.type, head.size = kind, len(data)
    return head.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def keys(count: int, start: int = 0, prefix: str = "k") -> bytes:
    """The records of so many keys without a value."""
    records = (f"{prefix}{number:06}=\n" for number in range(start, start + count))
    return b"".join(b"%d %b" % (len(record) + 3, record.encode()) for record in records)


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    """The bytes that were in use at most since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_header_for_all_files_is_not_kept_for_each(memory: Callable[[], int]) -> None:
    files = layer(*(entry(f"f{i}") for i in range(100)))
    with pytest.raises(PullError, match="header for all files"):
        merged(extended(tarfile.XGLTYPE, keys(30_000)) + files)
    assert names(merged(extended(tarfile.XGLTYPE, keys(16)) + files)) == sorted(f"f{i}" for i in range(100))
    assert memory() < 64 << 20


def test_headers_one_after_the_other_have_a_limit_together(memory: Callable[[], int]) -> None:
    one = keys(30_000)
    with pytest.raises(PullError, match="an extended header of"):
        merged(extended(tarfile.XHDTYPE, one) * 50 + layer(entry("f")))
    assert memory() < 64 << 20


def test_what_a_header_says_is_kept_only_if_it_is_an_attribute(memory: Callable[[], int]) -> None:
    said = extended(tarfile.XHDTYPE, keys(10_000))
    files = [f"f{i}" for i in range(10)]
    heads = [said + entry(name, b"x")[0].tobuf(tarfile.USTAR_FORMAT) + bytes(512) for name in files]
    assert names(merged(b"".join(heads))) == files
    assert memory() < 6 << 20, "what is kept of one is a megabyte"


def test_attributes_and_names_count_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_ENTRIES", 30)
    attributes = {f"SCHILY.xattr.user.{i}": "" for i in range(30)}
    for member in (
        entry("f", pax_headers=attributes), entry("f", pax_headers={"SCHILY.xattr.user.a": "v" * 8000}),
        symlink("f", "t" * 4000),
    ):  # fmt: skip
        tree = merged(layer(entry("other")))
        with pytest.raises(PullError, match="more than 30 files"):
            for number in range(3):
                file = tempfile.TemporaryFile()
                file.write(layer(member))
                file.seek(0)
                tree.add(f"{number}", file, 1 << 20)


def test_the_pieces_of_a_sparse_file_have_a_limit(memory: Callable[[], int]) -> None:
    old = tarfile.TarInfo("f")
    old.type = tarfile.GNUTYPE_SPARSE
    head = bytearray(old.tobuf(tarfile.GNU_FORMAT))
    head[482] = 1  # a block of pieces follows
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    block = b"%011o\0%011o\0" % (1, 1) * 21 + b"\1" + bytes(7)
    new = extended(tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
    new += entry("f")[0].tobuf(tarfile.USTAR_FORMAT)
    for tar in (bytes(head) + block * 10_000, new + b"2000000\n" + b"1\n" * 4_000_000, new + b"1\n" + b"1" * 3_000_000):
        with pytest.raises(PullError, match=r"a sparse map of more than 1048576 bytes|not a valid tar archive"):
            merged(tar + bytes(1024))
    assert memory() < 64 << 20


def test_marks_of_overlays_and_what_squashfs_lacks_stay_out() -> None:
    attributes = {"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.system.posix_acl_access": "x", "path": "f"}
    tree = merged(layer(entry("f", pax_headers={**attributes, "SCHILY.xattr.security.capability": "c"})))
    assert [inode.header.pax_headers for _, inode in tree.walk()] == [{"SCHILY.xattr.security.capability": "c"}]


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_file_keeps_its_bytes(tmp_path: Path, form: str) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        for number in range(1, 60):
            file.seek(number << 16)
            file.write(b"piece")
        file.truncate(61 << 16)
    options = ["--format=gnu"] if form == "gnu" else ["--format=posix", f"--sparse-version={form}"]
    tar = subprocess.run(
        ["tar", *options, "-cSf", "-", "-C", tmp_path, "sparse"], check=True, capture_output=True
    ).stdout  # fmt: skip
    assert len(tar) < 1 << 19
    image = tmp_path / "image"
    squashfs.write(merged(tar, limit=1 << 23), image, silent)
    cat = subprocess.run(["unsquashfs", "-cat", image, "sparse"], check=True, capture_output=True).stdout
    assert cat == path.read_bytes()


def sparse(pieces: str, size: int = 100, stored: bytes = b"") -> bytes:
    """A layer with a sparse file, in the format 1.0."""
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    table = pieces.replace(" ", "\n").encode() + b"\n"
    return layer(entry("f", table.ljust(-(-len(table) // 512) * 512, b"\0") + stored, pax_headers=headers))


def old_sparse(blocks: int) -> bytes:
    """A layer with a sparse file whose map has so many blocks, in the old format."""
    head = bytearray(entry("f", type=tarfile.GNUTYPE_SPARSE)[0].tobuf(tarfile.GNU_FORMAT))
    head[482:495] = b"\1" + b"%011o\0" % (1 << 30)
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    block = (b"%011o\0" % 512 + b"%011o\0" % 1) * 21
    return bytes(head) + (block + b"\1" + bytes(7)) * blocks + block + bytes(8 + 1024)


@pytest.mark.parametrize(
    ("tar", "problem"),
    [
        (sparse("1 0 -5"), "f has a damaged sparse map"),
        (sparse("2 50 10 0 10", stored=bytes(20)), "f has a damaged sparse map"),
        (sparse("2 0 10 5 10", stored=bytes(20)), "f has a damaged sparse map"),
        (sparse("1 95 10", stored=bytes(10)), "f has a damaged sparse map"),
        (sparse(f"{1 << 40} " + "1 " * (1 << 20)), "a sparse map of more than 1048576 bytes"),
        (old_sparse(2200), "a sparse map of more than 1048576 bytes"),
    ],
)
def test_maps_of_sparse_files_are_checked(tar: bytes, problem: str) -> None:
    with pytest.raises(PullError, match=problem):
        merged(tar, limit=1 << 40)


def negative(header: tarfile.TarInfo, size: int) -> bytes:
    """A header whose stored size is below zero."""
    data = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = size.to_bytes(12, "big", signed=True)
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, b"9", "size"])
def test_a_member_that_ends_before_its_beginning_is_not_read_for_ever(kind: bytes | str, tmp_path: Path) -> None:
    data = entry("a")[0].tobuf(tarfile.GNU_FORMAT)
    if isinstance(kind, bytes):
        data += negative(entry("f", type=kind)[0], -512)
    else:
        data += layer(entry("f", pax_headers={"size": "-1536"}))
    data += bytes(1024)
    with pytest.raises(PullError, match=r"layer 0: f has -\d+ bytes"):
        merged(data)
    with pytest.raises(PullError, match=r"saved.tar: f has -\d+ bytes"):
        sources.archive(saved(tmp_path, data))


def test_of_headers_only_what_is_needed_is_kept() -> None:
    """A layer of 8 GiB of headers is one of a few MB, compressed."""
    tracemalloc.start()
    tree = merged(layer(*(entry(f"f{i}", b"x", pax_headers={"comment": "x" * (1 << 19)}) for i in range(40))))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(names(tree)) == 40
    assert kept < 1 << 20


def test_failing_sqfstar_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="sqfstar: "):
        squashfs.write(merged(layer(entry("a", b"x"))), tmp_path / "no/such/image", silent)
