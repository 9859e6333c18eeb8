# SPDX-License-Identifier: Apache-2.0
"""Names of container images: ``oci:REF``, ``oci:DIR[:TAG]``, ``docker-archive:FILE[:REF]`` and ``dir:DIR``.

After ``oci:`` a name that begins with ``/``, ``./`` or ``../`` is a directory; any other is a registry's. As skopeo has
it, the path ends at its first colon.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import NamedTuple

from vmm.errors import ConfigError

KINDS = ("oci", "docker-archive", "dir")
# Source: distribution/reference, reference.go: what a name, a tag and a digest may be.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_REFERENCE = re.compile(
    rf"(?:(?P<host>{_HOST})/)?(?P<path>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}))?",
    re.ASCII,
)


class Name(NamedTuple):
    """A container image's name, taken apart."""

    kind: str  # one of KINDS
    place: str  # the registry as HOST[:PORT]; or the absolute path of a directory or a file
    repository: str  # of a registry
    tag: str  # or reference in a directory or an archive; may be empty there
    digest: str  # of a registry, or empty

    def __str__(self) -> str:
        if self.repository:
            tag = f":{self.tag}" if self.tag else ""
            return f"oci:{self.place}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")
        return f"{self.kind}:{self.place}" + (f":{self.tag}" if self.tag else "")

    @property
    def directory(self) -> str:
        """The name of the image's directory in the cache."""
        return "oci-" + hashlib.sha256(str(self).encode(errors="surrogateescape")).hexdigest()[:24]


def whole(text: str) -> str:
    """Return the name of an image in a registry with all its parts, as docker does; one that is invalid as it is.

    "a/b" and "docker.io/a/b:latest" are one image.
    """
    try:
        return str(parse(f"oci:{text}"))
    except ConfigError:
        return text


def parse(text: str) -> Name | None:
    """Return what `text` names, or None if it has none of the prefixes.

    :raises ConfigError: the text has a prefix but is not a valid name
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        return None
    if not rest or "\0" in rest:
        raise ConfigError("image", text, f"a name must follow {kind}:")
    if kind != "oci" or rest.startswith(("/", "./", "../")) or rest in (".", ".."):
        path, _, tag = (rest, "", "") if kind == "dir" else rest.partition(":")
        return Name(kind, os.path.abspath(path), "", tag, "")
    found = _REFERENCE.fullmatch(rest)
    if found is None:
        problem = "is not an image name: write oci:python:3.12, oci:HOST/NAME:TAG, or oci:./DIR for a directory"
        raise ConfigError("image", text, problem)
    host, path = found["host"], found["path"]
    # As docker has it: the first part is a host if it looks like one.
    if host and not ("." in host or ":" in host or host == "localhost"):
        host, path = None, f"{host}/{path}"
    if host in (None, "index.docker.io"):
        host = "docker.io"
    if host == "docker.io" and "/" not in path:
        path = f"library/{path}"
    digest = found["digest"] or ""
    if len(path) > 255:
        raise ConfigError("image", text, "is too long: a name has at most 255 characters")
    return Name("oci", host, path, found["tag"] or ("" if digest else "latest"), digest)
