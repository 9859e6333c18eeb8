# SPDX-License-Identifier: Apache-2.0
"""Where a container image comes from: a registry, a directory in OCI's layout, or an archive of `docker save`.

Each gives the image's config and its layers as files, with the digests checked that it has.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import msgspec
import zstandard

from vmm.errors import line
from vmm.images import manifest, reference
from vmm.images.host import Progress, PullError
from vmm.images.layers import DAMAGED, Header
from vmm.images.reference import Name
from vmm.images.registry import Registry

_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
_WINDOW = 1 << 27  # bytes; of zstd --long=27, the most that decoders take without being told
_REF_NAME = "org.opencontainers.image.ref.name"


class Damaged(PullError):
    """A layer does not match its digest."""


class Content(NamedTuple):
    """An image's config, and its layers, the lowest first; each is opened when its turn comes, compressed or not."""

    config: bytes
    layers: list[Callable[[], BinaryIO]]
    blobs: list[Path]  # what of it the cache keeps


def registry(name: Name, blobs: Path, progress: Progress) -> Content:
    """Fetch an image; what is in ``blobs`` already is not fetched again.

    :raises PullError: as ``Registry`` does
    """
    there = Registry(name)
    progress(f"{name}: looking it up", None)
    found = _manifest(str(name), *there.manifest(name.digest or name.tag), there.manifest)
    of = f"the config of {name}"
    if found.config.size > manifest.LIMIT:
        raise _too_large(of)
    blobs.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, blob in enumerate([found.config, *found.layers]):
        path = blobs / blob.digest.replace(":", "-")
        if not path.exists():
            what = f"layer {number} of {len(found.layers)}" if number else "the config"
            there.blob(blob, path, progress, f"{name}: {what} ({blob.size / 1e6:.1f} MB)")
        paths.append(path)
    with open(paths[0], "rb") as file:
        config = _limited(of, file)  # what is in the cache may be a layer
    try:
        manifest.check(of, config, found.config.digest)
    except PullError:
        paths[0].unlink()  # the next pull fetches it again
        raise
    return Content(config, [lambda path=path: open(path, "rb") for path in paths[1:]], paths)  # type: ignore[misc]


def layout(name: Name) -> Content:
    """Read an image from a directory.

    Source: OCI Image Format Specification 1.1, image-layout.md.
    :raises PullError: this is not such an image, or it is damaged
    """
    home = Path(name.place)
    index = manifest.decode(f"{home}/index.json", _small(home / "index.json"), manifest.Index)
    named = [((each.annotations or {}).get(_REF_NAME, ""), each) for each in index.manifests]
    tags = line(", ".join(dict.fromkeys(tag for tag, _ in named if tag)) or "none by name")
    found = [each for tag, each in named if name.tag in ("", tag)]
    if name.tag and not found:
        raise PullError(f"{home} has no image {name.tag}; it has {tags}")
    # several with one name, or none, are an image for several machines if they say for which
    bare = all(each.platform is None for each in found)
    if not name.tag and len({(tag, each.digest if bare else "") for tag, each in named}) > 1:
        raise PullError(f"{home} has several images: name one, as oci:{home}:TAG; it has {tags}")

    def path(digest: str) -> Path:
        return home / "blobs" / digest.replace(":", "/", 1)

    def document(digest: str) -> tuple[bytes, str]:
        data = _small(path(digest))
        manifest.check(f"{home}: a manifest", data, digest)
        return data, ""

    # otherwise the last one was added last
    chosen = manifest.pick(str(home), manifest.Index(found[-1:] if bare else found))
    image = _manifest(str(name), *document(chosen.digest), document)
    config = _small(path(image.config.digest))
    manifest.check(f"{home}: the config", config, image.config.digest)

    def layer(blob: manifest.Descriptor) -> BinaryIO:
        file = _opened(path(blob.digest))
        algorithm, _, wanted = blob.digest.partition(":")
        if hashlib.file_digest(file, algorithm).hexdigest() != wanted:  # type: ignore[arg-type]
            file.close()
            raise PullError(f"{home}: {blob.digest} does not match its digest")
        file.seek(0)
        return file

    return Content(config, [partial(layer, blob) for blob in image.layers], [])


class _Saved(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


def archive(name: Name) -> Content:
    """Read an image from what `docker save` or `podman save` wrote.

    :raises PullError: this is not such an image, or it is damaged
    """
    try:
        tar = tarfile.open(fileobj=_opened(Path(name.place)), mode="r:", tarinfo=Header)
        members = {os.path.normpath(member.name): member for member in tar}
    except PullError as error:
        raise PullError(f"{name.place}: {error}") from None
    except DAMAGED as error:
        raise PullError(
            f"{name.place} is not an archive of `docker save`: {line(error)} (unpack it, if compressed)"
        ) from None

    def member(path: str) -> BinaryIO:
        found = members.get(os.path.normpath(path))
        if found is not None and found.issym():  # docker's, to another image's layer
            found = members.get(os.path.normpath(os.path.join(os.path.dirname(path), found.linkname)))
        if found is None or not found.isreg():
            raise PullError(f"{name.place} has no file {line(path)} in it")
        return cast("BinaryIO", tar.extractfile(found))

    def small(path: str) -> bytes:
        return _limited(f"{name.place}: {line(path)}", member(path))

    if "manifest.json" not in members and "oci-layout" in members:
        raise PullError(f"{name.place} is an archive in OCI's layout: unpack it, and name the directory, as oci:DIR")
    images = manifest.decode(f"{name.place}: manifest.json", small("manifest.json"), list[_Saved])
    tags = [tag for image in images for tag in image.repo_tags or ()]
    if name.tag:
        wanted = reference.whole(name.tag)
        images = [image for image in images if wanted in map(reference.whole, image.repo_tags or ())]
    if len(images) != 1:
        there = line(", ".join(tags) or "none by name")
        raise PullError(f"name one image, as docker-archive:{name.place}:REF; it has {there}")
    (image,) = images
    if len(image.layers) > manifest.MAX_LAYERS:
        raise PullError(f"{name} has {len(image.layers)} layers; at most {manifest.MAX_LAYERS} are read")
    return Content(small(image.config), [lambda path=path: member(path) for path in image.layers], [])  # type: ignore[misc]


def _manifest(what: str, data: bytes, kind: str, document: Callable[[str], tuple[bytes, str]]) -> manifest.Manifest:
    # through one index, or two, to the image for this machine
    for _ in range(3):
        head = manifest.decode(f"the manifest of {what}", data, manifest.Head)
        if head.schema_version != 2:
            raise PullError(
                f"{what} is in docker's old manifest schema {head.schema_version}; only 2 is supported: push it again"
            )
        if not manifest.is_index(kind, head):
            found = manifest.decode(f"the manifest of {what}", data, manifest.Manifest)
            manifest.check_layers(what, found)
            return found
        chosen = manifest.pick(what, manifest.decode(f"the index of {what}", data, manifest.Index))
        data, kind = document(chosen.digest)
    raise PullError(f"{what} has indexes nested too deeply")


def _opened(path: Path) -> BinaryIO:
    try:
        file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    except OSError as error:
        raise PullError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise PullError(f"{path} is not a file")
    return file


def _small(path: Path) -> bytes:
    with _opened(path) as file:
        return _limited(str(path), file)


def _limited(what: str, file: BinaryIO) -> bytes:
    data = file.read(manifest.LIMIT + 1)
    if len(data) > manifest.LIMIT:
        raise _too_large(what)
    return data


def _too_large(what: str) -> PullError:
    return PullError(f"{what} is larger than {manifest.LIMIT} bytes")


def unpack(what: str, file: BinaryIO, diff_id: str, limit: int, directory: Path) -> tuple[BinaryIO, int]:
    """Return a layer's tar, uncompressed, in a file without a name, and its length in bytes.

    How it is compressed its first bytes say, as other readers have it. Long zeros take no space.

    :param diff_id: the digest of the tar
    :param limit: bytes of the tar
    :raises PullError: the file is longer than allowed; Damaged: it has another digest, or cannot be uncompressed
    """
    algorithm, _, wanted = diff_id.partition(":")
    digest = hashlib.new(algorithm)
    tar = cast("BinaryIO", tempfile.TemporaryFile(dir=directory))
    try:
        head = file.read(4)
        file.seek(0)
        stream: BinaryIO = file
        if head[:2] == b"\x1f\x8b":
            stream = cast("BinaryIO", gzip.GzipFile(fileobj=file))
        elif head == b"\x28\xb5\x2f\xfd":
            reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
            stream = cast("BinaryIO", reader.stream_reader(file, read_across_frames=True))
        size = 0
        while piece := stream.read(_CHUNK):
            size += len(piece)
            if size > limit:
                raise PullError(f"{what} is larger than {limit >> 20} MiB unpacked: raise --size, if you trust it")
            digest.update(piece)
            if piece == _ZEROS[: len(piece)]:
                tar.seek(size)
            else:
                tar.write(piece)
        if digest.hexdigest() != wanted:
            raise Damaged(f"{what} does not match its digest: wanted {diff_id}, got {algorithm}:{digest.hexdigest()}")
        tar.truncate(size)
        tar.seek(0)
    except BaseException as error:
        tar.close()
        if isinstance(error, (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError)):
            raise Damaged(f"{what} is damaged: {line(error)}") from None
        raise
    return tar, size
