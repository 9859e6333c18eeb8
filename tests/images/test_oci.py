# SPDX-License-Identifier: Apache-2.0
"""Container images from a directory, an archive or a tree: in the cache whole, or refused by one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.images.layouts import Made, descriptor, digest, directory, entry, layer
from tests.virtio.mounts import bind, mounted, private_mounts
from vmm import images
from vmm.errors import ConfigError
from vmm.images import oci, reference, users
from vmm.images.host import PullError

BASE = layer(
    directory("etc"), entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n"),
    entry("etc/group", b"root:x:0:\nwww:x:34:\nlog:x:4:web,root\nother:x:9:web\n"),
)  # fmt: skip
PROGRAM = {
    "Entrypoint": ["/bin/server"], "Cmd": ["-v"], "Env": ["PATH=/bin", "A=b=c", "lonely"], "User": "web",
    "WorkingDir": "srv/www/..", "Volumes": {"/data": {}, "rel": {}}, "StopSignal": "3", "ExposedPorts": {"80/tcp": {}},
    "Labels": {"a": "b"},
}  # fmt: skip


def listed(disk: str) -> list[str]:
    said = subprocess.run(["unsquashfs", "-l", disk], check=True, capture_output=True, text=True).stdout
    return [line.removeprefix("squashfs-root/") for line in said.splitlines()[1:]]


@pytest.mark.parametrize("how", ["", "+gzip", "+zstd"])
def test_layout_becomes_an_image(kernel: Path, tmp_path: Path, how: str) -> None:
    home = Made([BASE, layer(entry("bin/server", b"x"))], PROGRAM, how).write(tmp_path / "layout")
    image = images.pull(f"oci:{home}")
    assert images.resolve(f"oci:{home}") is not None
    assert listed(image.rootfs) == ["bin", "bin/server", "etc", "etc/group", "etc/passwd"]
    assert image.disks == [image.rootfs]
    config = image.config
    assert config is not None
    assert config.argv == ["/bin/server", "-v"]
    assert config.env == {"PATH": "/bin", "A": "b=c"}
    assert (config.uid, config.gid, config.groups, config.home) == (33, 34, (4, 9), "/var/www")
    assert (config.working_dir, config.volumes, config.stop_signal) == ("/srv", ("/data", "/rel"), "SIGQUIT")
    assert (config.exposed_ports, config.labels) == (("80/tcp",), {"a": "b"})


def test_archive_of_skopeo_is_the_same_disk(kernel: Path, tmp_path: Path) -> None:
    home = Made([BASE], PROGRAM).write(tmp_path / "layout")
    archive = tmp_path / "a.tar"
    subprocess.run(
        ["skopeo", "copy", "--insecure-policy", f"oci:{home}:latest", f"docker-archive:{archive}:test/a:1"],
        check=True, capture_output=True,
    )  # fmt: skip
    one, other = images.pull(f"oci:{home}"), images.pull(f"docker-archive:{archive}")
    assert os.path.samefile(one.rootfs, other.rootfs)
    assert one.config == other.config
    for same in ("docker.io/test/a:1", "test/a:1", "index.docker.io/test/a:1"):
        assert images.pull(f"docker-archive:{archive}:{same}").config == one.config
    with pytest.raises(PullError, match=r"name one image, as docker-archive:.*; it has docker.io/test/a:1"):
        images.pull(f"docker-archive:{archive}:b")


def test_format_that_is_not_read_is_named_with_one_that_is(kernel: Path, tmp_path: Path) -> None:
    home = Made([BASE]).write(tmp_path / "layout")
    for kind in ("oci-archive", "dir"):
        skopeo = ["skopeo", "copy", "--insecure-policy", f"oci:{home}:latest", f"{kind}:{tmp_path}/{kind}"]
        subprocess.run(skopeo, check=True, capture_output=True)
    for name, problem in {
        f"docker-archive:{tmp_path}/oci-archive": r"is an archive in OCI's layout: unpack it, and name .* as oci:DIR",
        f"dir:{tmp_path}/dir": r"is an image in skopeo's format: `skopeo copy dir:... oci:DIR` makes one",
        f"dir:{home}": rf"is an image in OCI's layout: name it oci:{home}",
    }.items():
        with pytest.raises(PullError, match=problem):
            images.pull(name)
    (tmp_path / "dir/version").write_text("1.0")
    assert "version" in listed(images.pull(f"dir:{tmp_path}/dir").rootfs)


@pytest.mark.parametrize(
    ("written", "number"),
    [("015", 15), ("34", 34), ("64", 64), ("rtmin+3", 37), ("SIGRTMAX-2", 62), ("RTMAX-30", 34), ("RTMAX", 64)],
)  # fmt: skip
def test_stop_signal_has_many_names(kernel: Path, tmp_path: Path, written: str, number: int) -> None:
    image = images.pull(f"oci:{Made([BASE], {'StopSignal': written}).write(tmp_path / 'layout')}")
    assert image.config is not None and image.config.stop_number == number


def test_disk_without_an_image_goes(kernel: Path, tmp_path: Path) -> None:
    images.pull(f"oci:{Made([BASE]).write(tmp_path / 'a')}")
    (tmp_path / "a").rename(tmp_path / "b")
    Made([BASE, layer(entry("x"))]).write(tmp_path / "a")
    images.pull(f"oci:{tmp_path}/a", refresh=True)
    assert len(list((kernel / "disks").iterdir())) == 1


def test_a_disk_that_another_pull_removes_first_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "gone.squashfs"]))
    oci._sweep()


def test_a_disk_that_images_share_is_on_the_disk_before(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """One that a power failure left empty would be every later image's with these layers, refreshed or not."""
    synced: list[str] = []
    linked: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    link = os.link

    def linking(source: Path, target: Path) -> None:
        link(source, target)
        linked.append("disk" in synced)

    monkeypatch.setattr(os, "link", linking)
    images.pull(f"oci:{Made([BASE]).write(tmp_path / 'a')}")
    assert linked == [True]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EXDEV])
def test_a_disk_is_shared_where_that_can_be(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:  # fmt: skip
    """Not on exFAT, between two file systems, or by more images than a file may have names."""

    def refused(source: Path, target: Path) -> None:
        if not source.exists():
            raise FileNotFoundError(errno.ENOENT, "", str(source))
        raise OSError(number, os.strerror(number), str(source))

    monkeypatch.setattr(os, "link", refused)
    home = Made([BASE]).write(tmp_path / "a")
    assert listed(images.pull(f"oci:{home}").rootfs)
    shared = kernel / "disks"
    for disk in kernel.glob("images/*/rootfs.squashfs"):
        shutil.copy(disk, shared / _name_of(BASE))
    assert listed(images.pull(f"oci:{home}", refresh=True).rootfs)


def _name_of(*tars: bytes) -> str:
    words = ["1", "-comp", "lz4", *map(digest, tars)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest() + ".squashfs"


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "disks").mkdir(parents=True)
    (cache / "disks/old.squashfs").touch()

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "unlink", refused)
    oci._sweep()


def test_tree_becomes_an_image(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/motd").write_text("x")
    image = images.pull(f"dir:{tmp_path}/tree")
    assert listed(image.rootfs) == ["etc", "etc/motd"]
    assert image.config is not None and image.config.argv == []
    with pytest.raises(PullError, match="nosuch is not a directory"):
        images.pull(f"dir:{tmp_path}/nosuch")


@private_mounts
def test_what_is_mounted_in_a_tree_is_not_taken(kernel: Path, tmp_path: Path) -> None:
    for name in ("proc", 'my "home', "proc2/sub"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    (tmp_path / "tree/mem").touch()
    assert mounted("proc", tmp_path / "tree/proc") and mounted("tmpfs", tmp_path / 'tree/my "home')
    (tmp_path / 'tree/my "home/secret').touch()
    bind("/proc/self/status", tmp_path / "tree/mem")
    assert listed(images.pull(f"dir:{tmp_path}/tree").rootfs) == ['my "home', "proc", "proc2", "proc2/sub"]


def test_list_has_it(kernel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vmm.commands.cli import main

    home = Made([BASE]).write(tmp_path / "layout")
    assert main(["pull", f"oci:{home}"]) == 0
    assert main(["pull", "--list"]) == 0
    assert f"oci:{home}" in capsys.readouterr().out


def _blob(made: Made, number: int, home: Path) -> Path:
    name: str = made.manifest["layers"][number]["digest"]
    return home / "blobs" / name.replace(":", "/")


def _index(home: Path, **platforms: dict[str, str]) -> None:
    found = json.loads((home / "index.json").read_text())
    (manifest,) = found["manifests"]
    found["manifests"] = [{**manifest, "platform": platform} for platform in platforms.values()]
    (home / "index.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        ("no index", r"index.json: No such file or directory"),
        ("index a pipe", r"index.json is not a file"),
        ("index huge", r"index.json is larger than 4194304 bytes"),
        ("index no json", r"index.json is damaged: Input data was truncated"),
        ("digest a path", r"index.json is damaged: .*matching regex"),
        ("manifest changed", r"a manifest does not match its digest: wanted sha256:"),
        ("config changed", r"the config does not match its digest"),
        ("layer changed", r"sha256:[0-9a-f]{64} does not match its digest"),
        ("layer missing", r"sha256/[0-9a-f]{64}: No such file"),
        ("layer truncated gzip", r"layer 1 is damaged: Compressed file ended"),
        ("other diff_id", r"layer 1 does not match its digest: wanted sha256:0{64}"),
        ("fewer diff_ids", r"has 1 layers, and its config says 0"),
        ("other machine", r"is for linux/arm64; linux/amd64 is needed"),
        ("no machine", r"has no image for linux/amd64; it has linux/arm64, linux/s390x"),
        ("unknown layer", r"has a layer of type application/x-iso; supported: tar, tar\+gzip and tar\+zstd"),
        ("stop signal", r"has an invalid stop signal: SIGNOPE"),
        ("signal of the C library", r"has an invalid stop signal: 32"),
        ("signal below the first", r"has an invalid stop signal: SIGRTMAX-31"),
        ("user", r"the image's user nobody is not in its /etc/passwd"),
        ("group", r"the image's group staff is not in its /etc/group"),
        ("zero byte", r"has a NUL byte in a word"),
        ("zeros", r"layer 1 is larger than 2 MiB unpacked: raise --size, if you trust it"),
        ("old schema", r"is in docker's old manifest schema 1; only 2 is supported"),
        ("no tag", r"has no image other; it has latest"),
    ],
)
def test_bad_image_is_one_line_and_leaves_nothing(kernel: Path, tmp_path: Path, spoil: str, problem: str) -> None:
    made = Made([layer(entry("z", bytes(3 << 20))) if spoil == "zeros" else BASE])
    program: dict[str, Any] = made.config["config"]
    size, tag = 2 << 20, ""
    match spoil:
        case "layer truncated gzip":
            made.layers[0] = made.layers[0][:-20]
        case "other diff_id":
            made.config["rootfs"]["diff_ids"] = [f"sha256:{'0' * 64}"]
        case "fewer diff_ids":
            made.config["rootfs"]["diff_ids"] = []
        case "other machine":
            made.config["architecture"] = "arm64"
        case "unknown layer":
            made.kind = "application/x-iso"
        case "stop signal":
            program["StopSignal"] = "SIGNOPE"
        case "signal of the C library":
            program["StopSignal"] = "32"
        case "signal below the first":
            program["StopSignal"] = "SIGRTMAX-31"
        case "user":
            program["User"] = "nobody"
        case "group":
            program["User"] = "0:staff"
        case "zero byte":
            program["Cmd"] = ["a\0b"]
        case "no tag":
            tag = ":other"
    made.seal()
    if spoil == "old schema":
        made.manifest = {"schemaVersion": 1, "fsLayers": []}
    home = made.write(tmp_path / "layout")
    index = home / "index.json"
    match spoil:
        case "no index":
            index.unlink()
        case "index a pipe":
            index.unlink()
            os.mkfifo(index)
        case "index huge":
            index.write_bytes(b" " * ((4 << 20) + 1))
        case "index no json":
            index.write_text("{")
        case "digest a path":
            index.write_text(json.dumps({"manifests": [{"digest": "sha256:../../../../etc/passwd", "size": 1}]}))
        case "manifest changed":
            _changed(home / "blobs" / digest(made.document()).replace(":", "/"))
        case "config changed":
            _changed(home / "blobs" / made.manifest["config"]["digest"].replace(":", "/"))
        case "layer changed":
            _changed(_blob(made, 0, home))
        case "layer missing":
            _blob(made, 0, home).unlink()
        case "no machine":
            _index(home, a={"os": "linux", "architecture": "arm64"}, b={"os": "linux", "architecture": "s390x"})
    with pytest.raises(PullError, match=problem) as caught:
        images.pull(f"oci:{home}{tag}", size=size)
    assert "\n" not in str(caught.value)
    left = {path.name for path in (kernel / "images").iterdir() if not path.name.endswith(".lock")}
    assert left == set()
    assert not list((kernel / "disks").glob("*")) if (kernel / "disks").exists() else True


def _changed(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("variant", [{}, {"variant": "v1"}])
def test_index_in_an_index_leads_to_this_machine(kernel: Path, tmp_path: Path, variant: dict[str, str]) -> None:
    made = Made([BASE])
    home = made.write(tmp_path / "layout")
    manifest = made.document()
    foreign = descriptor("", b"elsewhere", platform={"os": "linux", "architecture": "arm64"})
    newer = [
        descriptor("", b"elsewhere", platform={"os": "linux", "architecture": "amd64", "variant": variant})
        for variant in ("v3", "v2")
    ]
    ours = descriptor("", manifest, platform={"os": "linux", "architecture": "amd64"} | variant)
    inner = json.dumps({"schemaVersion": 2, "manifests": [foreign, *newer, ours]}).encode()
    (home / "blobs" / digest(inner).replace(":", "/")).write_bytes(inner)
    kind = "application/vnd.oci.image.index.v1+json"
    (home / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor(kind, inner)]}))
    assert listed(images.pull(f"oci:{home}").rootfs)


def test_layout_has_images_of_one_name_and_of_none(kernel: Path, tmp_path: Path) -> None:
    def described(made: Made, tag: str, machine: str = "") -> dict[str, Any]:
        more: dict[str, Any] = {"annotations": {"org.opencontainers.image.ref.name": tag}} if tag else {}
        if machine:
            more["platform"] = {"os": "linux", "architecture": machine}
        document = made.document()
        (home / "blobs" / digest(document).replace(":", "/")).write_bytes(document)
        return descriptor("", document, **more)

    def write(*manifests: dict[str, Any]) -> None:
        (home / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))

    ours, other = Made([BASE, layer(entry("ours"))]), Made([BASE, layer(entry("other"))])
    home = ours.write(tmp_path / "layout")
    other.write(tmp_path / "other")
    for tag in ("", "a"):
        write(described(ours, tag, "amd64"), described(other, tag, "arm64"))
        for name in {f"oci:{home}", f"oci:{home}:{tag}".rstrip(":")}:
            assert "ours" in listed(images.pull(name, refresh=True).rootfs)
    write(described(other, ""), described(ours, ""))
    with pytest.raises(PullError, match=r"has several images: name one, as oci:.*:TAG; it has none by name"):
        images.pull(f"oci:{home}", refresh=True)
    write(described(other, "a"), described(ours, "a"))  # the later one was added later
    assert "ours" in listed(images.pull(f"oci:{home}:a", refresh=True).rootfs)
    write(described(other, ""), described(ours, "a"))
    with pytest.raises(PullError, match=r"has several images: name one, as oci:.*:TAG; it has a$"):
        images.pull(f"oci:{home}", refresh=True)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("oci:python:3.12", "oci:docker.io/library/python:3.12"),
        ("oci:python", "oci:docker.io/library/python:latest"),
        ("oci:a/b", "oci:docker.io/a/b:latest"),
        ("oci:index.docker.io/a/b:c", "oci:docker.io/a/b:c"),
        ("oci:localhost/a", "oci:localhost/a:latest"),
        ("oci:127.0.0.1:5000/a/b/c:d", "oci:127.0.0.1:5000/a/b/c:d"),
        ("oci:[::1]:5000/a", "oci:[::1]:5000/a:latest"),
        (f"oci:ghcr.io/a/b@sha256:{'a' * 64}", f"oci:ghcr.io/a/b@sha256:{'a' * 64}"),
        ("oci:/a/b:c", "oci:/a/b:c"),
        ("docker-archive:/a.tar:b:c", "docker-archive:/a.tar:b:c"),
        ("dir:/a:b", "dir:/a:b"),
    ],
)
def test_names(text: str, whole: str) -> None:
    assert str(reference.parse(text)) == whole


@pytest.mark.parametrize(
    "text", ["oci:", "oci:A", "oci:a:", "oci:a@sha256:12", "oci:a//b", "oci:-a", "dir:", "oci:a b"]
)
def test_what_is_no_name_is_refused(cache: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="image "):
        images.resolve(text)
    assert reference.parse("debian") is None


def test_packages_are_not_for_container_images(cache: Path) -> None:
    with pytest.raises(ConfigError, match="--packages git: is for busybox and debian"):
        images.pull("oci:x", packages=["git"])


@pytest.mark.parametrize(
    ("user", "found"),
    [
        ("", (0, 0, (4,), "/root")),
        ("web:9", (33, 9, (), "/var/www")),
        ("33", (33, 34, (4, 9), "/var/www")),
        ("1234", (1234, 0, (), "/")),
        ("1234:www", (1234, 34, (), "/")),
    ],
)
def test_users(user: str, found: tuple[object, ...]) -> None:
    passwd = b"root:x:0:0::/root:/bin/sh\nbad\nweb:x:33:34::/var/www:/bin/sh\n\xff:x:a:b::::\n"
    group = b"root:x:0:\nwww:x:34:\nlog:x:4:web,root\nother:x:9:web\nbad\n"
    assert tuple(users.look_up(user, passwd, group)) == found
