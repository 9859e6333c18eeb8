# SPDX-License-Identifier: Apache-2.0
"""Registries: Debian's docker-registry as it is, and one that stalls, breaks off and lies."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.images.layouts import Made, digest, docker_registry, entry, layer
from tests.images.test_oci import BASE, PROGRAM, listed
from vmm import images
from vmm.images import host, registry
from vmm.images.host import PullError

# alice's is "secret"
HTPASSWD = "alice:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


class Server(ThreadingHTTPServer):
    """A registry of one image that does as the test says: ``answer`` may take a request over."""

    daemon_threads = True

    def __init__(self, made: Made) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made = made
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answer: Callable[[_Handler], bool] = lambda handler: False
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def blobs_asked(self) -> list[tuple[str, dict[str, str]]]:
        return [(path, headers) for path, headers in self.asked if "/blobs/" in path]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that does not speak HTTP, or went away

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        if self.server.answer(self):
            return
        made = self.server.made
        if "/manifests/" in self.path:
            self.send(made.document(), kind=made.manifest["mediaType"])
        elif (data := made.blobs.get(self.path.rpartition("/")[2])) is not None:
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send(data[begin:], 206 if begin else 200)
        else:
            self.send(b"", 404)

    def send(
        self, data: bytes, status: int = 200, *, kind: str = "x/y", length: int | None = None, **more: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for key, value in more.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


def _log_out(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(registry, "RUN", str(home / "run"))


@pytest.fixture
def server(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A registry on this host; nobody is logged in anywhere."""
    _log_out(monkeypatch, kernel.parent)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for what is on this host
    there = Server(Made([BASE, layer(entry("bin/x", bytes(range(256)) * 4096))], PROGRAM, ""))
    yield there
    there.stop()


def _is_layer(handler: _Handler, number: int = 1) -> bool:
    return handler.path.endswith(handler.server.made.manifest["layers"][number]["digest"])


def test_image_is_fetched_once(server: Server, tmp_path: Path) -> None:
    image = images.pull(f"oci:{server.place}/a/b")
    assert listed(image.rootfs) == ["bin", "bin/x", "etc", "etc/group", "etc/passwd"]
    count = len(server.asked)
    images.pull(f"oci:{server.place}/a/b")
    assert len(server.asked) == count
    images.pull(f"oci:{server.place}/a/b", refresh=True)
    assert [path for path, _ in server.asked[count:] if "/blobs/" in path] == []
    images.pull(f"oci:{server.place}/a/b@{digest(server.made.document())}")


def test_layer_of_another_image_is_not_fetched_again(server: Server) -> None:
    images.pull(f"oci:{server.place}/a/b")
    server.made = Made([BASE, layer(entry("other"))], PROGRAM, "")
    server.asked.clear()
    images.pull(f"oci:{server.place}/a/c")
    assert len(server.blobs_asked) == 2  # the config and one layer


def test_download_goes_on_where_it_broke_off(server: Server) -> None:
    def answer(handler: _Handler) -> bool:
        if not _is_layer(handler) or "Range" in handler.headers:
            return False
        data = handler.server.made.layers[1]
        handler.send(data[:300000], length=len(data))
        return True

    server.answer = answer
    assert "bin/x" in listed(images.pull(f"oci:{server.place}/a").rootfs)
    assert [headers.get("Range") for path, headers in server.blobs_asked][-1] == "bytes=300000-"


def test_download_begins_anew_where_no_range_is_given(server: Server) -> None:
    sent: list[int] = []

    def answer(handler: _Handler) -> bool:
        if not _is_layer(handler):
            return False
        data = handler.server.made.layers[1]
        handler.send(data if sent else data[:1000], length=len(data))
        sent.append(1)
        return True

    server.answer = answer
    assert "bin/x" in listed(images.pull(f"oci:{server.place}/a").rootfs)


def test_killed_pull_is_resumed(server: Server, kernel: Path) -> None:
    blob = server.made.manifest["layers"][1]["digest"].replace(":", "-")
    (kernel / "blobs").mkdir(parents=True)
    (kernel / f"blobs/{blob}.part").write_bytes(server.made.layers[1][:1234])
    images.pull(f"oci:{server.place}/a")
    assert [headers.get("Range") for path, headers in server.blobs_asked][-1] == "bytes=1234-"


def test_token_is_asked_for_and_goes_to_the_registry_alone(server: Server, tmp_path: Path) -> None:
    store = Server(server.made)
    (tmp_path / "cache/.docker").mkdir(parents=True)
    login = {"auths": {server.place: {"auth": b64encode(b"alice:secret").decode()}}}
    (tmp_path / "cache/.docker/config.json").write_text(json.dumps(login))

    def answer(handler: _Handler) -> bool:
        if handler.path.startswith("/token"):
            handler.send(json.dumps({"token": "t0ken"}).encode())
        elif handler.headers.get("Authorization") != "Bearer t0ken":
            challenge = f'Bearer realm="http://{server.place}/token",service="me",scope="x"'
            handler.send(b"", 401, WWW_Authenticate=challenge)
        elif "/blobs/" in handler.path:
            handler.send(b"", 307, Location=f"http://{store.place}{handler.path}")
        else:
            return False
        return True

    server.answer = answer
    try:
        images.pull(f"oci:{server.place}/a/b")
    finally:
        store.stop()
    ((path, headers),) = [asked for asked in server.asked if asked[0].startswith("/token")]
    assert path == "/token?scope=repository%3Aa%2Fb%3Apull&service=me"
    assert headers["Authorization"] == f"Basic {b64encode(b'alice:secret').decode()}"
    assert len(store.asked) == 3
    assert not any("Authorization" in headers for _, headers in store.asked)


def _stall(handler: _Handler) -> bool:
    if _is_layer(handler):
        handler.send(b"x" * 10, length=1000)
        time.sleep(0.5)
        return True
    return False


def _answering(data: bytes, status: int = 200, **more: Any) -> Callable[[_Handler], bool]:
    def answer(handler: _Handler) -> bool:
        handler.send(data, status, **more)
        return True

    return answer


def _layer(data: bytes, **more: Any) -> Callable[[_Handler], bool]:
    answer = _answering(data, **more)
    return lambda handler: _is_layer(handler) and answer(handler)


def _garbage(handler: _Handler) -> bool:
    handler.wfile.write(b"\x00\xff no HTTP\r\n\r\n")
    return True


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (_stall, "sent nothing for 0 s"),
        (_garbage, "closed the connection early: "),
        (_answering(b"", 404), "has no such image"),
        (_answering(b"", 403), "denies access: the image does not exist, or needs a login"),
        (_answering(b"", 401), "needs a login: docker login"),
        (
            _answering(b"", 401, WWW_Authenticate='Bearer realm="file:///etc/passwd"'),
            "names file:///etc/passwd as its token server",
        ),
        (_answering(b"", 429), "allows no more downloads for now"),
        (_answering(b"", 500), "answered 500 Internal Server Error"),
        (_answering(b"", 418), "answered 418"),
        (_answering(b"", 307, Location="file:///etc/passwd"), "answered 307"),
        (_answering(b"", 307, Location="ftp://127.0.0.1/x"), "redirects to ftp://127.0.0.1/x, which is not http://"),
        (_answering(b"", 307, Location="http://a..b/"), "cannot reach .*: a host name that cannot be"),
        (_answering(b"", 307, Location="http://[::1/"), "cannot reach .*: a host name that cannot be"),
        (_answering(b"x" * ((4 << 20) + 1)), "a manifest of more than 4194304 bytes was sent"),
        (_answering(b"<html>", kind="text/html"), "is damaged: JSON is malformed"),
        (_layer(b"short", length=5), "ended in the middle of sha256:"),
        (_layer(b"x" * (2 << 20)), "sent something else as sha256:[0-9a-f]{64}: it is longer than"),
        (_layer(bytes(1054720)), "sent something else as sha256:[0-9a-f]{64}: it has another digest"),
    ],
)
def test_bad_registry_is_one_line(
    server: Server, kernel: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[_Handler], bool], problem: str
) -> None:  # fmt: skip
    assert len(server.made.layers[1]) == 1054720
    monkeypatch.setattr(registry, "STALL", 0.15)
    monkeypatch.setattr(host, "TRIES", 2)
    server.answer = answer
    with pytest.raises(PullError, match=problem) as caught:
        images.pull(f"oci:{server.place}/a")
    assert "\n" not in str(caught.value)
    assert [path for path in (kernel / "images").iterdir() if not path.name.endswith(".lock")] == []
    server.answer = lambda handler: False
    images.pull(f"oci:{server.place}/a")  # what was left does no harm


@pytest.mark.parametrize("what", ["layer", "manifest"])
def test_registry_that_drips_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(registry, "STALL", 0.1)
    monkeypatch.setattr(host, "TRIES", 1)

    def answer(handler: _Handler) -> bool:
        drips = _is_layer(handler) if what == "layer" else "/manifests/" in handler.path
        if drips:
            handler.send(b"", length=1000)
            for _ in range(10):
                handler.wfile.write(b"x")
                time.sleep(0.03)
        return drips

    server.answer = answer
    with pytest.raises(PullError, match=r"sent \d+ bytes in 0 s"):
        images.pull(f"oci:{server.place}/a")


@pytest.mark.parametrize("what", ["config", "layer"])
def test_a_blob_has_its_name_when_it_is_whole(
    server: Server, kernel: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:  # fmt: skip
    """Whoever is killed, or finds the disk full, at the rename or just after it, leaves no half of a blob."""
    named: list[int] = []
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            named.append(self.stat().st_size)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    images.pull(f"oci:{server.place}/a")
    manifest = server.made.manifest
    assert named == [each["size"] for each in (manifest["config"], *manifest["layers"])]

    # As a pyvmm of before, or a power failure, may have left it: it is fetched again.
    blob = {"config": manifest["config"], "layer": manifest["layers"][1]}[what]
    (kernel / "blobs" / blob["digest"].replace(":", "-")).write_bytes(b"")
    for path in (kernel / "disks").iterdir():
        path.unlink()
    with pytest.raises(PullError, match="does not match its digest"):
        images.pull(f"oci:{server.place}/a", refresh=True)
    images.pull(f"oci:{server.place}/a", refresh=True)


@pytest.mark.parametrize("what", ["manifests", "token"])
def test_a_document_that_breaks_off_is_asked_for_again(server: Server, what: str) -> None:
    broken: list[str] = []

    def answer(handler: _Handler) -> bool:
        if handler.path.startswith("/token"):
            data = json.dumps({"token": "t0ken"}).encode()
        elif handler.headers.get("Authorization") != "Bearer t0ken":
            handler.send(b"", 401, WWW_Authenticate=f'Bearer realm="http://{server.place}/token"')
            return True
        elif "/manifests/" in handler.path:
            data = handler.server.made.document()
        else:
            return False
        half = what in handler.path and not broken
        handler.send(data[: len(data) // 2] if half else data, kind="application/json", length=len(data))
        broken.extend([what] * half)
        return True

    server.answer = answer
    images.pull(f"oci:{server.place}/a")
    assert broken == [what]


def test_a_route_that_goes_away_is_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop changes its network in the middle of a layer: recv(2) says EHOSTUNREACH, which is no ConnectionError."""
    read1 = http.client.HTTPResponse.read1
    lost: list[int] = []

    def lossy(self: http.client.HTTPResponse, size: int = -1) -> bytes:
        if self.length and self.length > 1 << 19 and not lost:
            lost.append(errno.EHOSTUNREACH)
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        return read1(self, size)

    monkeypatch.setattr(http.client.HTTPResponse, "read1", lossy)
    images.pull(f"oci:{server.place}/a")
    assert lost


def test_manifest_by_digest_is_checked(server: Server) -> None:
    with pytest.raises(PullError, match=r"the manifest of .* does not match its digest"):
        images.pull(f"oci:{server.place}/a@sha256:{'0' * 64}")


def test_a_config_is_not_larger_than_a_document(server: Server, kernel: Path) -> None:
    """A registry could fill the memory; and name a layer, which is in the cache, as the config of another image."""
    made = server.made
    made.config["config"] = {**PROGRAM, "Labels": {"a": "x" * (5 << 20)}}
    made.seal()
    problem = r"the config of oci:.* is larger than 4194304 bytes"
    with pytest.raises(PullError, match=problem):
        images.pull(f"oci:{server.place}/a")
    assert not server.blobs_asked
    config = made.manifest["config"]
    kept = kernel / "blobs" / config["digest"].replace(":", "-")
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(made.blobs[config["digest"]])
    config["size"] = 7
    with pytest.raises(PullError, match="is larger than 4194304 bytes"):
        images.pull(f"oci:{server.place}/a")


def test_nobody_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(PullError, match=rf"cannot reach 127.0.0.1:{port}: .*Connection refused"):
        images.pull(f"oci:127.0.0.1:{port}/a")


def test_file_of_logins_that_is_none(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "auth.json").write_text("{")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    with pytest.raises(PullError, match=r"auth.json: is not a readable login file"):
        registry.credentials("example.org")


def test_login_of_a_helper(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\nread -r name\necho "{\\"Username\\": \\"$name\\", \\"Secret\\": \\"s\\"}"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "auth.json").write_text('{"credHelpers": {"example.org": "test"}}')
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    assert registry.credentials("example.org") == "example.org:s"
    assert registry.credentials("example.com") == ""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's docker-registry on loopback, with a login; images by skopeo in it. Its address."""
    home = tmp_path_factory.mktemp("registry")
    (home / "users").write_text(HTPASSWD)
    layout = Made([BASE, layer(entry("bin/x", b"x" * 100))], PROGRAM).write(home / "layout")
    with docker_registry(home, f"auth: {{htpasswd: {{realm: r, path: {home}/users}}}}") as place:
        for tag, options in (
            ("oci", []),
            ("docker", ["--format", "v2s2"]),
            ("zstd", ["--dest-compress-format", "zstd", "--dest-oci-accept-uncompressed-layers"]),
        ):
            skopeo = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", "--dest-creds", "alice:secret"]
            subprocess.run(
                [*skopeo, *options, f"oci:{layout}:latest", f"docker://{place}/test/image:{tag}"],
                check=True, capture_output=True,
            )  # fmt: skip
        yield place


@pytest.mark.parametrize("scope", ["", "/test", "/test/image"])
@pytest.mark.parametrize("where", ["run", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "HOME"])
def test_login_of_skopeo_is_found(
    real: str, kernel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, scope: str
) -> None:  # fmt: skip
    _log_out(monkeypatch, tmp_path / "home")
    places = {"run": f"home/run/{os.getuid()}", "HOME": "home/.config/containers"}
    if where not in places:
        monkeypatch.setenv(where, str(tmp_path / where))
    file = tmp_path / places.get(where, f"{where}/containers") / "auth.json"
    file.parent.mkdir(parents=True)
    skopeo = ["skopeo", "login", "--tls-verify=false", "--authfile", str(file), "-u", "alice", "-p", "secret"]
    subprocess.run([*skopeo, real + scope], check=True, capture_output=True)
    assert registry.credentials(real, "test/image") == "alice:secret"
    assert registry.credentials(real, "other/image") == ("" if scope else "alice:secret")
    if where == "run":
        assert "bin/x" in listed(images.pull(f"oci:{real}/test/image:oci").rootfs)


def test_real_registry(real: str, kernel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _log_out(monkeypatch, tmp_path)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    with pytest.raises(PullError, match="needs a login: docker login"):
        images.pull(f"oci:{real}/test/image:oci")
    login = {"auths": {real: {"auth": b64encode(b"alice:wrong").decode()}}}
    (tmp_path / "auth.json").write_text(json.dumps(login))
    with pytest.raises(PullError, match="denies access"):
        images.pull(f"oci:{real}/test/image:oci")
    login["auths"][real]["auth"] = b64encode(b"alice:secret").decode()
    (tmp_path / "auth.json").write_text(json.dumps(login))
    found = [images.pull(f"oci:{real}/test/image:{tag}") for tag in ("oci", "docker", "zstd")]
    assert len({Path(image.rootfs).stat().st_ino for image in found}) == 1
    assert all(image.config == found[0].config for image in found)
    assert "bin/x" in listed(found[0].rootfs)
    with pytest.raises(PullError, match="has no such image"):
        images.pull(f"oci:{real}/test/image:none")
