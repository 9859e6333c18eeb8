# SPDX-License-Identifier: Apache-2.0
"""Directories of a sandbox as tar archives: GNU tar reads what the agent packs; the agent unpacks what tars make."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm import Sandbox
from vmm.sandbox import AsyncSandbox

pytestmark = pytest.mark.timeout(900)  # the first one may build r3
LONG = "n" * 120
DEEP = "/".join(["d" * 90] * 4)
SIZES = (0, 1, 511, 512, 513, 65535, 65536, 65537, 262144, 700_001)


@pytest.fixture(scope="module")
def sandbox(runtime: Path) -> Iterator[Sandbox]:
    with Sandbox("busybox", memory="256M") as made:
        yield made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with what is hard to pack."""
    tree = tmp_path / "tree"
    (tree / DEEP).mkdir(parents=True)
    (tree / DEEP / LONG).write_bytes(b"deep")
    (tree / LONG).symlink_to("t/" * 150)
    for size in SIZES:
        (tree / f"{size}").write_bytes(os.urandom(size))
    os.utime(tree / "512", (1e9, 1e9))
    os.utime(tree / "513", (-1e9 - 0.5, -1e9 - 0.5))
    (tree / "empty").mkdir()
    (tree / "closed").mkdir()
    (tree / "closed/inside").write_bytes(b"inside")
    (tree / "closed").chmod(0o555)
    (tree / "run").write_bytes(b"#!/bin/sh\n")
    (tree / "run").chmod(0o750)
    (tree / "outside").symlink_to("/etc/passwd")
    Path(os.fsdecode(os.fsencode(tree) + b"/\xff\xfe \n")).write_bytes(b"no UTF-8")
    (tree / "ünï").write_bytes(b"UTF-8")
    os.mkfifo(tree / "pipe")
    return tree


def seen(tree: Path) -> dict[str, tuple[int, object]]:
    """Mode and contents of all that is in a directory, without FIFOs."""
    found: dict[str, tuple[int, object]] = {}
    for path in (tree, *tree.rglob("*")):
        mode = path.lstat().st_mode
        what: object = None
        if path.is_symlink():
            mode, what = 0, os.readlink(path)
        elif path.is_file():
            what = path.read_bytes()
        if not path.is_fifo():
            found[str(path.relative_to(tree))] = mode, what
    return found


@pytest.mark.parametrize("user", [None, "nobody"])
def test_a_directory_comes_back_as_it_was(sandbox: Sandbox, tree: Path, tmp_path: Path, user: str | None) -> None:
    sandbox.run("rm -rf /tmp/in", check=True)
    sandbox.files.copy_in(str(tree), "/tmp/in", user=user)
    sandbox.files.copy_out("/tmp/in", str(tmp_path / "back"), user=user)
    assert seen(tmp_path / "back") == seen(tree)
    assert (tmp_path / "back/512").stat().st_mtime == 1e9
    owner = sandbox.run("stat -c %U /tmp/in/run /tmp/in/closed/inside").stdout.split()
    assert owner == [user or "root"] * 2
    assert not sandbox.files.exists("/tmp/in/pipe")


def test_gnu_tar_reads_what_the_agent_packs(sandbox: Sandbox, tree: Path, tmp_path: Path) -> None:
    sandbox.files.copy_in(str(tree), "/tmp/packed")
    archive = tmp_path / "out.tar"
    archive.write_bytes(b"".join(sandbox.files.get_archive("/tmp/packed")))
    (tmp_path / "here").mkdir()
    subprocess.run(["tar", "-C", tmp_path / "here", "-xpf", archive], check=True)
    assert seen(tmp_path / "here") == seen(tree)


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7", "busybox", "python"])
def test_the_agent_unpacks_what_tars_make(sandbox: Sandbox, tree: Path, tmp_path: Path, form: str) -> None:
    os.link(tree / "run", tree / "other name")
    (tree / "pipe").unlink()
    if form in ("ustar", "v7"):  # which have no long names, and nothing from before 1970
        os.utime(tree / "513")
        shutil.rmtree(tree / DEEP.partition("/")[0])
        (tree / LONG).unlink()
    packed = io.BytesIO()
    if form == "python":
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(tree, ".")
    else:
        command = ["busybox", "tar", "-c"] if form == "busybox" else ["tar", f"--format={form}", "-c"]
        packed.write(subprocess.run([*command, "-C", tree, "."], check=True, stdout=subprocess.PIPE).stdout)
    where = f"/tmp/put-{form}/a/b"
    sandbox.files.put_archive(where, packed.getvalue())
    sandbox.files.copy_out(where, str(tmp_path / "back"))
    assert seen(tmp_path / "back") == seen(tree)
    same = sandbox.run(f"stat -c %i '{where}/run' '{where}/other name'").stdout.split()
    assert same[0] == same[1]


def one(name: str, data: bytes = b"", **about: object) -> bytes:
    """An archive of one file."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for key, value in about.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(data))
    return archive.getvalue()


def test_what_is_there_is_replaced_or_named(sandbox: Sandbox) -> None:
    files = sandbox.files
    sandbox.run(
        "mkdir -p /srv/t/dir && cd /srv/t && echo other > other && ln -s other link && cp /bin/busybox busy", check=True
    )
    busy = sandbox.exec(["/srv/t/busy", "sleep", "1000"])
    for name in ("link", "busy", "new/below"):
        files.put_archive("/srv/t", one(name, b"put"))
        assert files.read(f"/srv/t/{name}") == "put"
    assert files.read("/srv/t/other") == "other\n", "it is not written through a link"
    busy.kill()
    with pytest.raises(IsADirectoryError) as directory:
        files.put_archive("/srv/t", one("dir", b"put"))
    assert directory.value.filename == "/srv/t/dir"
    for name in ("a/../../x", ".."):
        with pytest.raises(OSError) as outside:
            files.put_archive("/srv/t", one(name, b"put"))
        assert (outside.value.errno, outside.value.filename) == (errno.EINVAL, f"/srv/t/{name}")
    files.put_archive("/srv/t", one("/abs", b"put"))
    assert files.read("/srv/t/abs") == "put"
    with pytest.raises(NotADirectoryError):
        files.put_archive("/srv/t/other", one("x"))
    for text in (b"first", b"second"):  # as git's objects, which not even their owner may write
        files.put_archive("/tmp/mine", one("object", text, mode=0o444), user="nobody")
        assert files.read("/tmp/mine/object") == text.decode()
    files.put_archive("/srv/t", one("device", type=tarfile.CHRTYPE, devmajor=1, devminor=3))
    assert not files.exists("/srv/t/device")


def test_what_is_no_archive(sandbox: Sandbox) -> None:
    whole = one("file", b"x" * 3000)
    for bad in (b"x" * 512, b"x", whole[:700], whole[:100], os.urandom(300_000)):
        with pytest.raises(OSError) as refused:
            sandbox.files.put_archive("/tmp/bad", bad)
        assert refused.value.errno == errno.EBADMSG
    for empty in (b"", bytes(512), bytes(1024)):
        sandbox.files.put_archive("/tmp/nothing", empty)
    assert sandbox.files.list("/tmp/nothing") == []
    sandbox.files.put_archive("/tmp/tail", whole + b"whatever follows" * 50_000)
    assert sandbox.files.stat("/tmp/tail/file").size == 3000


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_file_with_holes_is_refused(sandbox: Sandbox, tmp_path: Path, form: str) -> None:
    """It was left out if it had nothing but holes, and made of what is between them."""
    for number, data in enumerate((b"", b"x")):
        place = tmp_path / f"holes{number}"
        place.mkdir()
        with open(place / "file", "wb") as file:
            file.truncate(1 << 20)
            file.write(data)
        command = ["tar", f"--format={form}", "-cS", "-C", str(place), "."]
        packed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        assert len(packed) < 1 << 16
        with pytest.raises(OSError) as refused:
            sandbox.files.put_archive(f"/tmp/holes{number}", packed)
        assert refused.value.errno == errno.EBADMSG


def test_other_names_of_a_file_keep_its_contents(sandbox: Sandbox) -> None:
    files = sandbox.files
    sandbox.run("mkdir -p /srv/n && cd /srv/n && echo old > one && ln one two", check=True)
    files.put_archive("/srv/n", one("one", b"new"))
    assert [files.read(f"/srv/n/{name}") for name in ("one", "two")] == ["new", "old\n"]
    # Who may write the file, but not its directory, writes it in place.
    sandbox.run("cd /srv/n && rm one && ln two one && chmod 666 one && chown nobody one", check=True)
    files.put_archive("/srv/n", one("one", b"new"), user="nobody")
    assert files.read("/srv/n/two") == "new"


def test_what_cannot_be_read_or_made_is_named(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "deep" / "/".join("d" * 300)).mkdir(parents=True)
    with pytest.raises(OSError, match="nested more than 256 deep"):
        sandbox.files.copy_in(str(tmp_path / "deep"), "/tmp/deep")
    sandbox.run(f"mkdir -p /srv/deep/{'d/' * 300}", check=True)
    with pytest.raises(OSError) as deep:
        sandbox.files.copy_out("/srv/deep", str(tmp_path / "back"))
    assert deep.value.errno == errno.ELOOP
    sandbox.run("mkdir -p /srv/secret/a && echo x > /srv/secret/a/b && chmod 700 /srv/secret/a", check=True)
    with pytest.raises(PermissionError) as refused:
        sandbox.files.copy_out("/srv/secret", str(tmp_path / "out"), user="nobody")
    assert refused.value.filename == "/srv/secret/a"
    with pytest.raises(PermissionError) as unwritable:
        sandbox.files.put_archive("/srv/secret", one("x/y", b"z"), user="nobody")
    assert unwritable.value.filename == "/srv/secret/x/y"
    with pytest.raises(FileNotFoundError):
        list(sandbox.files.get_archive("/no/such"))
    with pytest.raises(NotADirectoryError):
        list(sandbox.files.get_archive("/etc/passwd"))
    assert sandbox.run("echo on").stdout == "on\n"


def test_files_whose_size_is_a_lie(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.files.copy_out("/proc/sys/kernel/random", str(tmp_path / "random"))
    assert len((tmp_path / "random/boot_id").read_text()) == 37, "stat says 0"
    sandbox.files.copy_out("/sys/kernel/mm", str(tmp_path / "mm"))
    values = [path.read_bytes() for path in (tmp_path / "mm").rglob("*") if path.is_file()]
    assert values and not any(b"\0" in value for value in values), "stat says 4096"


def test_files_that_change_while_they_are_packed(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.run("mkdir -p /tmp/busy", check=True)
    churn = "head -c $((RANDOM * 9)) /dev/zero > /tmp/busy/$((RANDOM % 9)); rm -f /tmp/busy/$((RANDOM % 9))"
    process = sandbox.exec(["sh", "-c", f"while :; do {churn}; done"])
    for number in range(20):
        sandbox.files.copy_out("/tmp/busy", str(tmp_path / f"{number}"))
    process.kill()


def test_files_that_are_removed_while_they_are_packed(sandbox: Sandbox) -> None:
    fill = "i=0; while [ $i -lt 99 ]; do echo x >$i; ln -s x l$i; mkdir -p d$i/e; i=$((i+1)); done"
    sandbox.run("mkdir -p /tmp/gone", check=True)
    with sandbox.exec(["sh", "-c", f"cd /tmp/gone; while :; do {fill}; rm -rf *; done"]):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            assert b"".join(sandbox.files.get_archive("/tmp/gone"))


def test_a_tree_of_many_files(sandbox: Sandbox, tmp_path: Path) -> None:
    for number in range(3000):
        path = tmp_path / f"many/{number % 50}/{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    sandbox.files.copy_in(str(tmp_path / "many"), "/tmp/many")
    assert int(sandbox.run("cat /tmp/many/*/* | md5sum >&2; find /tmp/many -type f | wc -l").stdout) == 3000
    sandbox.files.copy_out("/tmp/many", str(tmp_path / "back"))
    assert seen(tmp_path / "back") == seen(tmp_path / "many")


async def _by_asyncio(directory: Path) -> None:
    async with AsyncSandbox("busybox", memory="64M") as sandbox:
        await sandbox.files.put_archive("/tmp/a", one("x", b"1"))
        pieces = [piece async for piece in sandbox.files.get_archive("/tmp/a")]
        (directory / "a.tar").write_bytes(b"".join(pieces))


def test_the_same_by_asyncio(runtime: Path, tmp_path: Path) -> None:
    import asyncio

    asyncio.run(_by_asyncio(tmp_path))
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == [".", "./x"]
