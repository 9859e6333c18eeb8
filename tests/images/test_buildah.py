# SPDX-License-Identifier: Apache-2.0
"""Images that buildah makes and writes in its ways: pulled, they have the files and the program that buildah says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.images.buildah import Buildah
from tests.images.layouts import docker_registry
from tests.images.test_layers import facts
from vmm import images
from vmm.images import reference, registry

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners are those of files that root has made")
CONTAINERFILE = """
FROM scratch
COPY lower /
COPY --chown=web:www data /srv/data
ADD --chmod=0751 data/one /a/b/c/
ENV A=1 B="two words" EMPTY= PATH=/bin
ENV A=3=4
LABEL one=1 two="of two words"
VOLUME ["/data", "/more"]
EXPOSE 80 53/udp
STOPSIGNAL SIGRTMIN+3
WORKDIR /srv
USER web
HEALTHCHECK CMD /bin/true
ENTRYPOINT ["/bin/server", "a  b"]
CMD ["-v", ""]
"""


class Built(NamedTuple):
    """Images in buildah's store, ``layered`` and ``squashed``, and the directory with the files of each."""

    buildah: Buildah
    files: Path


def _write_context(place: Path) -> None:
    (place / "lower/etc").mkdir(parents=True)
    (place / "lower/etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n")
    (place / "lower/etc/group").write_text("root:x:0:\nwww:x:34:\nlog:x:4:web\n")
    (place / "data/sub").mkdir(parents=True)
    (place / "data/one").write_text("one")
    # No other run has these bytes: of a layer that the host's cache knows, buildah pushes what is there already.
    (place / "data/sub" / ("n" * 200)).write_bytes(os.urandom(5000))
    (place / "data/link").symlink_to("sub")
    for name in ("gone", "becomes-file", "filled-anew"):
        shutil.copytree(place / "data", place / "lower" / name, symlinks=True)
    (place / "lower/becomes-directory").write_text("file")
    (place / "Containerfile").write_text(CONTAINERFILE)


def _change(top: Path) -> None:
    # a change of each kind, to the files of a container
    for name in ("gone", "becomes-file", "filled-anew"):
        shutil.rmtree(top / name)
    (top / "becomes-file").write_text("file")
    (top / "becomes-directory").unlink()
    for name in ("becomes-directory", "filled-anew"):
        (top / name).mkdir(0o700)
        (top / name / "in").write_text(name)
    (top / "hard").hardlink_to(top / "becomes-directory/in")
    (top / "a/b/c/one").chmod(0o6755)
    (top / "a/b").rename(top / "a/moved")
    os.chown(top / "srv/data/one", 3_000_000, 4_000_000_000)
    os.setxattr(top / "srv/data/one", "user.raw", b"\xff\0=")
    os.setxattr(top / "etc/group", "security.capability", bytes.fromhex("0100000200040000") + bytes(12))
    os.mknod(top / "null", 0o020666, os.makedev(1, 3))
    os.mkfifo(top / "fifo")
    with open(os.fsencode(top) + b"/a/\xff\n", "wb") as file:
        file.truncate(1 << 20)


def _round_times(top: Path) -> None:
    # to seconds: with --squash buildah rounds up, too
    for path in top.rglob("*"):
        if (time := path.lstat().st_mtime_ns) % 10**9:
            os.utime(path, ns=(time, time // 10**9 * 10**9), follow_symlinks=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An image of a Containerfile, changed. buildah waits up to a second for each of its layers."""
    home = tmp_path_factory.mktemp("buildah")
    _write_context(home / "context")
    _round_times(home / "context")
    buildah = Buildah(home)
    buildah("build", "--layers", "--format", "docker", "--tag", "base", home / "context")
    container, files = buildah.copy("base")
    _change(files)
    _round_times(files)
    buildah("commit", "--format", "docker", container, "layered")
    buildah("commit", "--format", "oci", "--squash", container, "squashed")
    return Built(buildah, files)


def unpacked(image: images.Image, place: Path) -> Path:
    subprocess.run(["unsquashfs", "-d", place, image.rootfs], check=True, capture_output=True)
    return place


@pytest.mark.parametrize(
    ("image", "transport", "more"),
    [
        ("layered", "oci", []),
        ("layered", "docker-archive", []),
        ("squashed", "oci", ["--compression-format", "zstd:chunked"]),
    ],
)
def test_image_is_what_buildah_says(
    built: Built, kernel: Path, tmp_path: Path, image: str, transport: str, more: list[str]
) -> None:  # fmt: skip
    name = f"{transport}:{tmp_path}/image:test/a:1"
    built.buildah("push", *more, image, name)
    pulled = images.pull(name)
    ours, theirs = facts(unpacked(pulled, tmp_path / "ours")), facts(built.files)
    assert ours.keys() == theirs.keys()
    for path, fact in theirs.items():
        assert ours[path] == fact, path
    about: dict[str, Any] = json.loads(built.buildah("inspect", "--type", "image", image))["OCIv1"]
    assert (len(about["rootfs"]["diff_ids"]) > 2) == (image == "layered")
    config = pulled.config
    assert config is not None
    assert {
        "Entrypoint": list(config.entrypoint), "Cmd": list(config.cmd), "User": config.user, "Labels": config.labels,
        "Env": [f"{key}={value}" for key, value in config.env.items()], "WorkingDir": config.working_dir,
        "Volumes": {path: {} for path in config.volumes}, "StopSignal": config.stop_signal,
        "ExposedPorts": {port: {} for port in config.exposed_ports},
    } == about["config"]  # fmt: skip
    assert (config.uid, config.gid, config.groups, config.home) == (33, 34, (4,), "/var/www")


def test_registry_has_what_buildah_pushes(built: Built, kernel: Path, tmp_path: Path) -> None:
    def push(image: str, tag: str, *more: str) -> str:
        command = ["manifest", "push", "--all"] if tag == "list" else ["push"]
        built.buildah(*command, "--tls-verify=false", *more, image, f"docker://{place}/test/{tag}:1")
        return f"oci:{place}/test/{tag}:1"

    def kinds(name: str) -> tuple[str, set[str]]:
        found = reference.parse(name)
        assert found is not None
        data, kind = registry.Registry(found).manifest(found.tag)
        return kind, {layer["mediaType"] for layer in json.loads(data).get("layers", ())}

    buildah = built.buildah
    with docker_registry(tmp_path) as place:
        docker = push("layered", "docker", "--format", "v2s2")
        zstd = push("squashed", "zstd", "--format", "oci", "--compression-format", "zstd")
        buildah("manifest", "create", "list")
        for option, machine in (("--arch", "arm64"), ("--variant", "v3")):
            container = buildah("from", "scratch")
            buildah("config", option, machine, container)
            buildah("commit", container, machine)
            buildah("manifest", "add", option, machine, "list", f"localhost/{machine}")
        buildah("manifest", "add", "list", "localhost/squashed")
        several = push("list", "list")
        assert kinds(docker) == (
            "application/vnd.docker.distribution.manifest.v2+json",
            {"application/vnd.docker.image.rootfs.diff.tar.gzip"},
        )
        oci = "application/vnd.oci.image"
        assert kinds(zstd) == (f"{oci}.manifest.v1+json", {f"{oci}.layer.v1.tar+zstd"})
        assert kinds(several)[0] == f"{oci}.index.v1+json"
        pulled = [images.pull(name) for name in (docker, zstd, several)]
    trees = [facts(unpacked(image, tmp_path / f"ours{number}")) for number, image in enumerate(pulled)]
    assert trees[0] == trees[1] == facts(built.files)
    assert os.path.samefile(pulled[1].rootfs, pulled[2].rootfs)
