# SPDX-License-Identifier: Apache-2.0
"""The JSON of container images, OCI's and docker's: index, manifest, config. All of it is checked as hostile.

Source: OCI Image Format Specification 1.1; docker's Image Manifest Version 2, Schema 2.
"""

from __future__ import annotations

import hashlib
import os.path
import re
import signal
from typing import Annotated, Any, TypeVar

import msgspec

from vmm.errors import line
from vmm.images.container import ImageConfig
from vmm.images.host import PullError

LIMIT = 4 << 20  # bytes of a manifest or a config: what registries take, too
MAX_LAYERS = 500
_OCI = "application/vnd.oci.image."
_DOCKER = "application/vnd.docker.distribution.manifest."
INDEXES = (f"{_OCI}index.v1+json", f"{_DOCKER}list.v2+json")
MANIFESTS = (f"{_OCI}manifest.v1+json", f"{_DOCKER}v2+json")
LAYERS = (
    *(f"{_OCI}layer.v1.tar{how}" for how in ("", "+gzip", "+zstd")),
    *(f"{_OCI}layer.nondistributable.v1.tar{how}" for how in ("", "+gzip", "+zstd")),
    *(f"application/vnd.docker.image.rootfs.{kind}.tar{how}" for kind in ("diff", "foreign.diff")
      for how in ("", ".gzip", ".zstd")),
)  # fmt: skip

Digest = Annotated[str, msgspec.Meta(pattern=r"^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$")]


class Platform(msgspec.Struct):
    """What an index says of an image in it."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, rename="camel"):
    """What names a blob: how long it must be, and the digest that it must have."""

    digest: Digest
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct, rename="camel"):
    """A list of images, one for each platform."""

    manifests: list[Descriptor]


class Manifest(msgspec.Struct, rename="camel"):
    """An image: its config and its layers, the lowest first."""

    config: Descriptor
    layers: Annotated[list[Descriptor], msgspec.Meta(max_length=MAX_LAYERS)]


class Head(msgspec.Struct, rename="camel"):
    """What tells an index from a manifest, where no header says it."""

    media_type: str = ""
    schema_version: int = 2
    manifests: list[Any] | None = None


class _Program(msgspec.Struct, rename="pascal"):
    user: str | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    volumes: dict[str, msgspec.Raw] | None = None
    exposed_ports: dict[str, msgspec.Raw] | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None


class _Root(msgspec.Struct):
    diff_ids: Annotated[list[Digest], msgspec.Meta(max_length=MAX_LAYERS)] = []


class _Config(msgspec.Struct):
    architecture: str = ""
    os: str = ""
    config: _Program | None = None
    rootfs: _Root | None = None


_T = TypeVar("_T")


def decode(what: str, data: bytes, kind: type[_T]) -> _T:
    """Return the JSON in `data` as a `kind`.

    :param what: its name in the error
    :raises PullError: the document has another type
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PullError(f"{what} is damaged: {line(error)}") from None


def check(what: str, data: bytes, digest: str) -> None:
    """Check that `data` has the digest.

    :raises PullError: the data has another digest
    """
    algorithm, _, wanted = digest.partition(":")
    found = hashlib.new(algorithm, data).hexdigest()
    if found != wanted:
        raise PullError(f"{what} does not match its digest: wanted {digest}, got {algorithm}:{found}")


def pick(what: str, index: Index) -> Descriptor:
    """Return the image for this machine, linux/amd64, of those in an index.

    Of several it is the one that needs the least of a CPU: amd64 before amd64/v2 and amd64/v3.

    :raises PullError: the index has no image for this machine; the message names those that it has
    """
    ours, offered = [], []
    for each in index.manifests:
        if each.platform is None:
            # an index of one image, as a layout's, need not say what its platform is: its config does
            if len(index.manifests) == 1:
                return each
            continue
        if (each.platform.os, each.platform.architecture) == ("linux", "amd64"):
            ours.append((each.platform.variant.removeprefix("v1"), each))
        elif each.platform.os != "unknown":  # "unknown" are attestations
            offered.append(f"{each.platform.os}/{each.platform.architecture}")
    if ours:
        return min(ours, key=lambda pair: pair[0])[1]
    names = line(", ".join(dict.fromkeys(offered)) or "none")
    raise PullError(f"{what} has no image for linux/amd64; it has {names}")


def is_index(media_type: str, head: Head) -> bool:
    """Whether a document is an index; what its sender calls it comes first."""
    if media_type in INDEXES or head.media_type in INDEXES:
        return True
    return media_type not in MANIFESTS and head.media_type not in MANIFESTS and head.manifests is not None


def check_layers(what: str, manifest: Manifest) -> None:
    """Check that pyvmm can read the media type of each layer.

    :raises PullError: the type of a layer is not supported
    """
    for layer in manifest.layers:
        if layer.media_type not in LAYERS:
            kind = line(layer.media_type) or "unnamed"
            raise PullError(f"{what} has a layer of type {kind}; supported: tar, tar+gzip and tar+zstd")


def read_config(what: str, data: bytes) -> tuple[ImageConfig, list[str]]:
    """Return what a config says of the program, its user not looked up yet, and the digest of each layer's tar.

    :raises PullError: the image is for another machine, or its config is invalid
    """
    found = decode(f"the config of {what}", data, _Config)
    if (found.os, found.architecture) != ("linux", "amd64"):
        raise PullError(f"{what} is for {line(found.os)}/{line(found.architecture)}; linux/amd64 is needed")
    program = found.config or _Program()
    words = [
        *(program.entrypoint or ()), *(program.cmd or ()), *(program.env or ()), *(program.volumes or ()),
        program.user or "", program.working_dir or "",
    ]  # fmt: skip
    if any("\0" in word for word in words):
        raise PullError(f"the config of {what} has a NUL byte in a word")
    env = dict(each.split("=", 1) for each in program.env or () if "=" in each)
    return ImageConfig(
        entrypoint=tuple(program.entrypoint or ()),
        cmd=tuple(program.cmd or ()),
        env=env,
        user=program.user or "",
        working_dir=_absolute(program.working_dir or "/"),
        volumes=tuple(dict.fromkeys(_absolute(path) for path in program.volumes or ())),
        exposed_ports=tuple(program.exposed_ports or ()),
        stop_signal=_signal(what, program.stop_signal or "SIGTERM"),
        labels=program.labels or {},
    ), found.rootfs.diff_ids if found.rootfs else []


def _absolute(path: str) -> str:
    return os.path.normpath("/" + path.lstrip("/"))


def _signal(what: str, name: str) -> str:
    # "SIGTERM", "TERM", "15"; real-time signals as "SIGRTMIN+3" and "SIGRTMAX-2"
    full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
    low, high = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
    number = 0
    if re.fullmatch(r"[0-9]{1,4}", name):
        number = int(name)
    elif below := re.fullmatch(r"SIGRTMAX-([0-9]{1,2})", full):
        number = high - int(below[1])
    if low <= number <= high:
        full = f"SIGRTMIN+{number - low}"
    elif name.isdigit():  # 32 and 33 are the C library's, and have no names
        full = next((each.name for each in signal.Signals if each == number), "")
    full = full.removesuffix("+0")
    if full in signal.Signals.__members__ or re.fullmatch(r"SIGRTMIN\+([1-9]|[12][0-9]|30)", full):
        return full
    raise PullError(f"the config of {what} has an invalid stop signal: {line(name)}")
