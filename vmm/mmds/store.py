# SPDX-License-Identifier: Apache-2.0
"""The microVM metadata service: one JSON document, written by the host, read by the guest over HTTP.

How the guest's requests come here is ``virtio.net.mmds``'s business. Source: Firecracker 1.12's docs/mmds, its answers
compared with the real one's in ``tests/vmm/test_mmds.py``; RFC 7396 (merge patch), RFC 6901 (paths).
"""

from __future__ import annotations

import os
import threading
import time

from vmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeAlias

    from vmm.config.devices import MmdsConfig

    Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

SIZE_LIMIT = 51200  # bytes of the document, and of an HTTP request's body to the API
MAX_DEPTH = 127
MAX_REQUEST = 4096  # bytes of a guest's request, the body included
TOKEN_PATH = "/latest/api/token"
MIN_TTL, MAX_TTL = 1, 21600  # seconds
_TOKEN_SIZE = 48  # characters
_TOKEN_HEADERS = (b"x-metadata-token", b"x-aws-ec2-metadata-token")
_TTL_HEADERS = (b"x-metadata-token-ttl-seconds", b"x-aws-ec2-metadata-token-ttl-seconds")
_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
    413: "Payload Too Large", 501: "Not Implemented",
}  # fmt: skip
_TEXT, _JSON = "text/plain", "application/json"


class MmdsError(VmmError):
    """The document was not changed.

    :param message: Firecracker's ``fault_message``, whole
    :param status: status of the API's answer: 400, or 413 if the document would become too large
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Refusal(Exception):
    # The guest's request is answered with an error.
    def __init__(self, status: int, text: str, *headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


class Mmds:
    """The document, and what the guest is told of it; every call from any thread.

    :param limit: bytes of the document as JSON, at most
    :param instance_id: tokens of another instance's are not valid here
    """

    def __init__(self, *, limit: int = SIZE_LIMIT, instance_id: str = "anonymous-instance") -> None:
        self.limit = limit
        self.instance_id = instance_id
        self.version = "V1"
        self.imds_compat = False
        self._lock = threading.Lock()
        self._there = False
        self._data: Json = None  # never changed in place: who has read it can go on reading
        self._key = b""
        self._made = time.monotonic()

    def configure(self, config: MmdsConfig) -> None:
        """Serve the guest by `config`'s version; with a version of before, its tokens stay valid."""
        with self._lock:
            if config.version == "V2" and not self._key:
                self._key = os.urandom(32)
            elif config.version == "V1":
                self._key = b""
            self.version = config.version
            self.imds_compat = config.imds_compat

    # The host's side

    def get(self) -> Json:
        """The document, its keys in order; ``{}`` until one is set. Not to be changed."""
        return {} if self._data is None else self._data

    def put(self, value: Json) -> None:
        """Make `value` the document; it is copied.

        :raises MmdsError: the document is too large, too deep or not JSON
        """
        with self._lock:
            self._set(_normal(value))

    def patch(self, value: Json) -> None:
        """Merge `value` into the document (RFC 7396).

        :raises MmdsError: there is no document yet, the new one would be too large, or `value` is too deep or not JSON
        """
        with self._lock:
            if not self._there:
                raise MmdsError("MMDS error: The MMDS data store is not initialized.")
            self._set(_merge(self._data, _normal(value)))

    def _set(self, value: Json) -> None:
        if len(_encode(value)) > self.limit:
            raise MmdsError("MMDS limit exceeded error: The MMDS patch request doesn't fit.", 413)
        self._data = value
        self._there = True

    # Tokens: the moment they end at, authenticated, so that none has to be kept

    def make_token(self, ttl_seconds: int) -> str:
        """A token for so many seconds, 1 to 21600; of version 2."""
        expiry = int((self._age() + ttl_seconds) * 1000)
        return self._sign(expiry.to_bytes(8, "big") + os.urandom(12))

    def _age(self) -> float:
        # Not the clock itself, which would tell the guest how long the host has been up.
        return time.monotonic() - self._made

    def _sign(self, what: bytes) -> str:
        import base64
        import hmac

        tag = hmac.digest(self._key, what + self.instance_id.encode(), "sha256")[:16]
        return base64.b64encode(what + tag).decode()

    def is_valid_token(self, token: str) -> bool:
        """Whether it is one of ours and has not ended."""
        import base64
        import hmac

        if len(token) != _TOKEN_SIZE or not self._key:
            return False
        try:
            what = base64.b64decode(token, validate=True)[:20]
        except ValueError:
            return False
        # Compared as text, too: another spelling of the same bytes is not what we gave out.
        return (
            hmac.compare_digest(self._sign(what).encode(), token.encode())
            and int.from_bytes(what[:8], "big") > self._age() * 1000
        )

    # The guest's side

    def serve(self, data: bytes) -> tuple[int, bytes, bool]:
        """Answer the first HTTP request of `data`, from the guest.

        :returns: how many bytes the request had, or 0: it is not all there; the answer; whether it is the last one
        """
        start = len(data) - len(data.lstrip(b"\r\n"))
        ends = [at + len(end) for end in (b"\n\r\n", b"\n\n") if (at := data.find(end, start)) >= 0]
        if not ends:
            return (0, b"", False) if len(data) < MAX_REQUEST else (len(data), _response(_too_large(), last=True), True)
        request = _Request()
        try:
            request.parse(data[start : min(ends)])
            whole = min(ends) + request.length
            if whole > MAX_REQUEST:
                raise _too_large()
        except _Refusal as refusal:  # where this request ends, and the next one begins, is not known
            return len(data), _response(refusal, last=True), True
        if whole > len(data):
            return 0, b"", False
        last = not request.keep_alive
        try:
            return whole, _response(self._answer(request), last=last), last
        except _Refusal as refusal:
            return whole, _response(refusal, last=last), last

    def _answer(self, request: _Request) -> tuple[bytes, str]:
        path = request.path
        if self.version == "V1":
            if request.method != b"GET":
                raise _Refusal(405, "Not allowed HTTP method.", "Allow: GET")
            return self._get(path, request)
        ttl = _ttl(request.headers)
        if request.method == b"PUT":
            if b"x-forwarded-for" in request.headers:
                raise _Refusal(400, "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For")
            if _pointer(path) != TOKEN_PATH:
                raise _Refusal(404, f"Resource not found: {path}.")
            if ttl is None:
                raise _Refusal(400, _NO_TTL)
            if not MIN_TTL <= ttl <= MAX_TTL:
                between = f"Please provide a value between {MIN_TTL} and {MAX_TTL}."
                raise _Refusal(400, f"Invalid time to live value provided for token: {ttl}. {between}")
            return self.make_token(ttl).encode(), _TEXT
        if request.method != b"GET":
            raise _Refusal(405, "Not allowed HTTP method.", "Allow: GET, PUT")
        token = _first(request.headers, _TOKEN_HEADERS)
        if token is None:
            raise _Refusal(401, _NO_TOKEN)
        if not self.is_valid_token(token[1].decode("latin-1")):
            raise _Refusal(401, "MMDS token not valid.")
        return self._get(path, request)

    def _get(self, path: str, request: _Request) -> tuple[bytes, str]:
        try:
            value = _resolve(self._data, _pointer(path).removesuffix("/"))
        except LookupError:
            raise _Refusal(404, f"Resource not found: {path}.") from None
        if request.wants_json and not self.imds_compat:
            return _encode(value), _JSON
        if isinstance(value, dict):
            lines = [key + "/" if isinstance(value[key], dict) else key for key in value]
            return "\n".join(lines).encode(), _TEXT
        if isinstance(value, str):
            return value.encode(), _TEXT
        raise _Refusal(501, "Cannot retrieve value. The value has an unsupported type.")


_NO_TTL = (
    "Token time to live value not found. Use `X-metadata-token-ttl-seconds` header to specify the token's lifetime."
)
_NO_TOKEN = "No MMDS token provided. Use `X-metadata-token` header to specify the session token."


def _too_large() -> _Refusal:
    return _Refusal(413, f"The request is larger than the limit of {MAX_REQUEST} bytes.")


class _Request:
    # The head of one request; a parser's protocol object, whose callbacks are httptools'.
    def __init__(self) -> None:
        self.url = b""
        self.headers: dict[bytes, bytes] = {}

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def parse(self, head: bytes) -> None:
        import httptools

        words = head.partition(b"\n")[0].split()
        if len(words) != 3:
            raise _Refusal(400, "Invalid request.")
        self.method = words[0]
        if self.method not in (b"GET", b"PUT", b"PATCH"):
            raise _Refusal(501, "Unsupported HTTP method.")
        if words[2] not in (b"HTTP/1.0", b"HTTP/1.1"):
            raise _Refusal(501, "Unsupported HTTP version.")
        try:
            httptools.HttpRequestParser(self).feed_data(head)
        except httptools.HttpParserUpgrade:
            pass  # a server may ignore the offer of another protocol (RFC 9110, 7.8), as Firecracker does
        except httptools.HttpParserError as error:
            raise _Refusal(400, f"Invalid request: {error}." if str(error) else "Invalid request.") from None
        if b"transfer-encoding" in self.headers:
            raise _Refusal(400, "Invalid header. Reason: Unsupported value. Key:Transfer-Encoding")
        self.length = int(self.headers.get(b"content-length", b"0"))
        choices = [each.strip() for each in self.headers.get(b"connection", b"").lower().split(b",")]
        self.keep_alive = b"close" not in choices and (words[2] == b"HTTP/1.1" or b"keep-alive" in choices)
        # Firecracker takes this one type; whoever names several gets text there, and so here.
        self.wants_json = self.headers.get(b"accept", b"").strip().lower() == _JSON.encode()
        path = self.url.decode()  # what is not ASCII the parser has refused
        if not path.startswith("/"):
            path = "/".join(["", *path.partition("://")[2].split("/")[1:]]) if path.count("/") > 2 else ""
        if not path:
            raise _Refusal(400, "Invalid URI.")
        self.path = path


def _response(answer: _Refusal | tuple[bytes, str], *, last: bool) -> bytes:
    if isinstance(answer, _Refusal):
        status, headers, body, kind = answer.status, answer.headers, str(answer).encode(), _TEXT
    else:
        status, headers, (body, kind) = 200, (), answer
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}", "Server: Firecracker API",
        f"Connection: {'close' if last else 'keep-alive'}", *headers, f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + body


def _first(headers: Mapping[bytes, bytes], names: tuple[bytes, ...]) -> tuple[bytes, bytes] | None:
    return next(((name, headers[name]) for name in names if name in headers), None)


def _ttl(headers: Mapping[bytes, bytes]) -> int | None:
    found = _first(headers, _TTL_HEADERS)
    if found is None:
        return None
    name, value = found[0].decode().replace("x-", "X-", 1), found[1].decode("latin-1")
    digits = value.removeprefix("+")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 10 or int(digits) >= 1 << 32:
        raise _Refusal(400, f"Invalid header. Reason: Invalid value. Key:{name}; Value:{value}")
    return int(digits)


def _pointer(path: str) -> str:
    while "//" in path:
        path = path.replace("//", "/")
    return path


def _resolve(value: Json, pointer: str) -> Json:
    # :raises LookupError: there is nothing
    for word in pointer.split("/")[1:]:
        word = word.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value[word]
        elif isinstance(value, list) and word.isascii() and word.isdigit() and (word == "0" or word[0] != "0"):
            value = value[int(word[:9])]
        else:
            raise LookupError(pointer)
    return value


def _merge(target: Json, patch: Json) -> Json:
    # RFC 7396 without a change to `target`.
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return dict(sorted(result.items()))


def _normal(value: object, depth: int = 0) -> Json:
    # A copy, as JSON has it, with each object's keys in order.
    if isinstance(value, (dict, list)) and depth >= MAX_DEPTH:
        raise MmdsError("An error occurred when deserializing the json body of a request: recursion limit exceeded.")
    match value:
        case None | bool():
            return value
        case str():
            if value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value):
                return value
        case int():
            return value if -(1 << 63) <= value < 1 << 64 else _normal(_float(value))
        case float():
            if value - value == 0:  # neither infinite nor not a number
                return value
        case list() | tuple():
            return [_normal(each, depth + 1) for each in value]
        case dict() if all(isinstance(key, str) for key in value):
            return {str(_normal(key)): _normal(value[key], depth + 1) for key in sorted(value)}
    raise MmdsError(f"MMDS error: {type(value).__name__} {value!s:.64}: is not JSON")


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _encode(value: Json) -> bytes:
    import msgspec

    return msgspec.json.encode(value)
