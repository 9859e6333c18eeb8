# SPDX-License-Identifier: Apache-2.0
"""A registry of container images, over HTTPS; over HTTP if it is on this host. All that it says is checked.

Source: OCI Distribution Specification 1.1, "Pull"; docker's "Token Authentication Specification".
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import ssl
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar
from urllib.error import HTTPError, URLError

from vmm.errors import line
from vmm.images import manifest as documents
from vmm.images.host import FetchError, Progress, PullError, tried
from vmm.images.reference import Name

STALL = 30.0  # seconds without a byte after which a registry has failed
SLOWEST = 1024  # bytes a second; one that is slower for longer than STALL has failed, too
RUN = "/run/containers"  # where podman, buildah and skopeo keep logins of users without XDG_RUNTIME_DIR
HUB = "registry-1.docker.io"  # where docker.io has its images
_ACCEPT = ", ".join((*documents.INDEXES, *documents.MANIFESTS))
_CHUNK = 1 << 20
_TOKEN_LIMIT = 1 << 20
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_AGAIN = (408, 429, 500, 502, 503, 504)
_NO_WAY = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)

_T = TypeVar("_T")


class Registry:
    """One repository of a registry."""

    def __init__(self, name: Name) -> None:
        self._name = name
        host = urllib.parse.urlsplit(f"//{name.place}").hostname or ""
        self._local = host == "localhost" or host == "::1" or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
        self._base = f"https://{HUB if name.place == 'docker.io' else name.place}"
        self._authorization = ""
        self._opener = _opener(proxies=not self._local)

    def manifest(self, reference: str) -> tuple[bytes, str]:
        """Return a manifest or an index, by tag or digest, and what the registry calls its type.

        :raises PullError: the image does not exist, or access is denied; FetchError: the registry failed
        """

        def fetch() -> tuple[bytes, str]:
            with self._open(f"manifests/{reference}", {"Accept": _ACCEPT}) as answer:
                data = self._read(answer, documents.LIMIT, "a manifest")
                return data, answer.headers.get_content_type()

        data, kind = tried(lambda: self._told(fetch))
        if ":" in reference:
            documents.check(f"the manifest of {self._name}", data, reference)
        return data, kind

    def blob(self, blob: documents.Descriptor, path: Path, progress: Progress, step: str) -> None:
        """Fetch a blob to a new file, going on with what an earlier call left in ``path`` with ``.part`` added.

        :raises PullError: its digest is another, or it is longer than it should be; FetchError: the registry failed
        """
        part = path.with_name(path.name + ".part")

        def fetch() -> None:
            with open(part, "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # another pull may be at it
                if path.exists():
                    part.unlink(missing_ok=True)
                else:
                    self._fetch(blob, file, progress, step)
                    file.flush()
                    os.fsync(file.fileno())  # what has the name is whole, whatever comes now
                    part.rename(path)

        tried(lambda: self._told(fetch))

    def _fetch(self, blob: documents.Descriptor, file: BinaryIO, progress: Progress, step: str) -> None:
        algorithm, _, wanted = blob.digest.partition(":")
        digest = hashlib.new(algorithm)
        file.seek(0)
        while piece := file.read(_CHUNK):
            digest.update(piece)
        if file.tell() > blob.size:
            file.truncate(0)
            digest = hashlib.new(algorithm)
        have = file.tell() if file.tell() <= blob.size else 0
        resumed = have > 0
        if have < blob.size:
            with self._open(f"blobs/{blob.digest}", {"Range": f"bytes={have}-"} if have else {}) as answer:
                if have and answer.status != 206:  # it sends all of it
                    file.truncate(0)
                    digest, have, resumed = hashlib.new(algorithm), 0, False
                for piece in self._pieces(answer, blob.digest):
                    have += len(piece)
                    if have > blob.size:
                        break
                    file.write(piece)
                    digest.update(piece)
                    progress(step, have / blob.size)
        if have < blob.size:
            raise FetchError(f"{self._name.place} ended in the middle of {blob.digest}")
        if have > blob.size or digest.hexdigest() != wanted:
            file.truncate(0)
            if resumed and have == blob.size:
                raise FetchError(f"{self._name.place}: the rest of an earlier download of {blob.digest} was damaged")
            how = f"is longer than {blob.size} bytes" if have > blob.size else "has another digest"
            raise PullError(f"{self._name.place} sent something else as {blob.digest}: it {how}")

    def _pieces(self, answer: http.client.HTTPResponse, what: str) -> Iterator[bytes]:
        # An answer's bytes, as long as they come, and not too slowly.
        size, began = 0, time.monotonic()
        while piece := answer.read1(_CHUNK):
            size += len(piece)
            spent = time.monotonic() - began
            if spent > STALL and size < SLOWEST * spent:
                raise FetchError(f"{self._name.place} sent {size} bytes in {spent:.0f} s")
            yield piece
        if answer.length:  # http.client takes this for an end
            raise FetchError(f"{self._name.place} ended in the middle of {what}")

    def _read(self, answer: http.client.HTTPResponse, limit: int, what: str) -> bytes:
        data = bytearray()
        for piece in self._pieces(answer, what):
            data += piece
            if len(data) > limit:
                raise PullError(f"{what} of more than {limit} bytes was sent")
        return bytes(data)

    def _told(self, fetch: Callable[[], _T]) -> _T:
        # every way in which HTTP fails, as one line
        place = self._name.place
        try:
            return fetch()
        except HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (TimeoutError, URLError) as error:
            why = error.reason if isinstance(error, URLError) else error
            if isinstance(why, TimeoutError):
                raise FetchError(f"{place} sent nothing for {STALL:.0f} s") from None
            raise FetchError(f"cannot reach {place}: {line(why)}") from None
        except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
            raise FetchError(f"{place} closed the connection early: {line(error) or type(error).__name__}") from None
        except OSError as error:
            if error.errno not in _NO_WAY:  # the disk's
                raise
            raise FetchError(f"cannot reach {place}: {line(error)}") from None
        except ValueError as error:
            raise PullError(f"cannot reach {place}: a host name that cannot be: {line(error)}") from None

    def _refused(self, error: HTTPError) -> PullError:
        name, place = self._name, self._name.place
        if error.code in (401, 403):
            return PullError(
                f"{name}: {place} denies access: the image does not exist, or needs a login (docker login {place})"
            )
        if error.code == 404:
            return PullError(f"{name}: {place} has no such image")
        if error.code == 429:
            return FetchError(f"{place} allows no more downloads for now; log in, or try later")
        kind = FetchError if error.code in _AGAIN else PullError
        return kind(f"{place} answered {error.code} {line(error.reason)}")

    def _open(self, what: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        url = f"{self._base}/v2/{self._name.repository}/{what}"
        try:
            return self._request(url, headers, self._authorization)
        except HTTPError as error:
            if error.code != 401:
                raise
            with error:
                self._authorization = self._authorize(error.headers.get_all("WWW-Authenticate") or [])
        except URLError as error:
            # docker's rule: on this host a registry may do without TLS
            if not self._local or not isinstance(error.reason, ssl.SSLError) or not self._base.startswith("https:"):
                raise
            self._base = f"http://{self._name.place}"
            return self._open(what, headers)
        return self._request(url, headers, self._authorization)

    def _request(self, url: str, headers: dict[str, str], authorization: str) -> http.client.HTTPResponse:
        request = urllib.request.Request(url, headers={"User-Agent": "pyvmm", **headers})
        if authorization:  # for this server alone, not for where it sends us
            request.add_unredirected_header("Authorization", authorization)
        answer: http.client.HTTPResponse = self._opener.open(request, timeout=STALL)
        return answer

    def _authorize(self, challenges: list[str]) -> str:
        known = credentials(self._name.place, self._name.repository)
        basic = f"Basic {base64.b64encode(known.encode()).decode()}" if known else ""
        for challenge in challenges:
            scheme, _, rest = challenge.partition(" ")
            if scheme.lower() == "basic" and basic:
                return basic
            if scheme.lower() == "bearer":
                return f"Bearer {self._token(dict(_CHALLENGE.findall(rest)), basic)}"
        raise PullError(f"{self._name}: {self._name.place} needs a login: docker login {self._name.place}")

    def _token(self, challenge: dict[str, str], basic: str) -> str:
        realm = challenge.get("realm", "")
        if not realm.startswith(("https://", "http://") if self._base.startswith("http:") else "https://"):
            raise PullError(
                f"{self._name.place} names {line(realm) or 'nothing'} as its token server; it must be https:"
            )
        query = {"scope": f"repository:{self._name.repository}:pull"}
        if "service" in challenge:
            query["service"] = challenge["service"]
        url = realm + ("&" if "?" in realm else "?") + urllib.parse.urlencode(query)
        with self._request(url, {}, basic) as answer:
            data = self._read(answer, _TOKEN_LIMIT, "a token")
        found = documents.decode(f"the token of {self._name.place}", data, dict[str, Any])
        token = found.get("token") or found.get("access_token")
        if not isinstance(token, str) or not token.isprintable() or not token.isascii():
            raise PullError(f"{self._name.place} gave no token")
        return token


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https://",) if req.type == "https" else ("https://", "http://")
        if not newurl.lower().startswith(allowed):  # ftp:, too, is a redirection for urllib
            raise URLError(f"it redirects to {line(newurl)}, which is not {allowed[-1]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(*, proxies: bool) -> urllib.request.OpenerDirector:
    # nothing but HTTP: no file:, no ftp:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler() if proxies else urllib.request.ProxyHandler({}),
        urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def credentials(place: str, repository: str = "") -> str:
    """Return ``USER:PASSWORD`` for a registry, as docker, podman, buildah or skopeo keep it; empty if they do not.

    One for ``PLACE/a/b`` or ``PLACE/a`` comes before one for ``PLACE``.

    Source: containers-auth.json(5); docker's config.json, credHelpers and credsStore.
    """
    home, runtime = os.path.expanduser("~"), os.environ.get("XDG_RUNTIME_DIR")
    files = [
        os.environ.get("REGISTRY_AUTH_FILE"),
        f"{runtime}/containers/auth.json" if runtime else f"{RUN}/{os.getuid()}/auth.json",
        os.path.join(os.environ.get("XDG_CONFIG_HOME") or f"{home}/.config", "containers/auth.json"),
        os.path.join(os.environ.get("DOCKER_CONFIG") or f"{home}/.docker", "config.json"),
    ]
    hosts = ("https://index.docker.io/v1/", "docker.io") if place == "docker.io" else (place, f"https://{place}")
    parts = repository.split("/") if repository else []
    keys = (*("/".join((place, *parts[:count])) for count in range(len(parts), 0, -1)), *hosts)
    for path in filter(None, files):
        try:
            found = json.loads(Path(path).read_bytes())
            for key in keys:
                if text := found.get("auths", {}).get(key, {}).get("auth"):
                    return base64.b64decode(text).decode().rstrip("\0")
                if key not in hosts:
                    continue  # helpers know whole registries
                if helper := found.get("credHelpers", {}).get(key) or found.get("credsStore"):
                    if known := _ask(helper, key):
                        return known
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise PullError(f"{path}: is not a readable login file: {line(error)}") from None
    return ""


def _ask(helper: str, key: str) -> str:
    done = subprocess.run([f"docker-credential-{helper}", "get"], input=key.encode(), capture_output=True)
    if done.returncode:
        return ""  # it knows none
    said = json.loads(done.stdout)
    return f"{said['Username']}:{said['Secret']}"
