# SPDX-License-Identifier: Apache-2.0
"""Container images made by hand: layers as tar archives, well-formed or not, in a directory of OCI's layout."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

OCI = "application/vnd.oci.image."
PLATFORM = {"os": "linux", "architecture": "amd64"}


def entry(name: str, data: bytes = b"", type: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A tar's entry."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = type, len(data), 0o755 if type == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def directory(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.DIRTYPE, **fields)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hardlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def layer(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A layer's tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def descriptor(kind: str, data: bytes, **more: Any) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest(data), "size": len(data), **more}


class Made:
    """An image's documents and blobs, by digest."""

    def __init__(self, layers: list[bytes], program: dict[str, Any] | None = None, how: str = "+gzip") -> None:
        packers: dict[str, Callable[[bytes], bytes]] = {
            "+gzip": gzip.compress,
            "+zstd": zstandard.ZstdCompressor().compress,
            "": bytes,
        }
        packed = packers[how]
        self.tars = layers
        self.layers = [packed(tar) for tar in layers]
        self.config: dict[str, Any] = {
            **PLATFORM, "config": program or {}, "rootfs": {"type": "layers", "diff_ids": [digest(t) for t in layers]},
        }  # fmt: skip
        self.kind = f"{OCI}layer.v1.tar{how}"
        self.manifest: dict[str, Any] = {}
        self.blobs: dict[str, bytes] = {}
        self.seal()

    def seal(self) -> None:
        """Make the manifest of what config and layers are now."""
        config = json.dumps(self.config).encode()
        self.manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}manifest.v1+json",
            "config": descriptor(f"{OCI}config.v1+json", config),
            "layers": [descriptor(self.kind, data) for data in self.layers],
        }
        self.blobs = {digest(data): data for data in (config, *self.layers)}

    def document(self) -> bytes:
        return json.dumps(self.manifest).encode()

    def write(self, home: Path, tag: str = "latest") -> Path:
        """Write it as a directory in OCI's layout."""
        (home / "blobs/sha256").mkdir(parents=True)
        (home / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        document = self.document()
        for name, data in {**self.blobs, digest(document): document}.items():
            (home / "blobs" / name.replace(":", "/")).write_bytes(data)
        named = {"org.opencontainers.image.ref.name": tag}
        manifests = [descriptor(f"{OCI}manifest.v1+json", document, annotations=named)]
        (home / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
        return home


@contextlib.contextmanager
def docker_registry(home: Path, more: str = "") -> Iterator[str]:
    """Debian's docker-registry on loopback: its address.

    :param home: where it keeps images
    :param more: lines of its configuration
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    (home / "config.yml").write_text(
        f"""
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {home}/data}}}}
http: {{addr: "{place}"}}
{more}
"""
    )
    process = subprocess.Popen(["docker-registry", "serve", home / "config.yml"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(place.rpartition(":")[2]))) == 0:
                    break
            time.sleep(0.02)
        yield place
    finally:
        process.terminate()
        process.wait()
