# SPDX-License-Identifier: Apache-2.0
"""The metadata service's document and its answers to the guest, beside what Firecracker 1.12.1 says."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.config.devices import MmdsConfig, NetConfig
from vmm.config.vm import VmConfig
from vmm.errors import ConfigError
from vmm.mmds.store import MAX_REQUEST, Mmds, MmdsError

DOCUMENT = {
    "name": {"first": "John", "second": "Doe"},
    "age": 43,
    "phones": ["+401234567", {"home": "+441234567"}],
    "member": False,
    "share": 12.12,
    "none": None,
    "a/b": {"~": "tilde"},
    "empty": {},
}
WHOLE = json.dumps(DOCUMENT, sort_keys=True, separators=(",", ":"))
TTL, TOKEN = "X-metadata-token-ttl-seconds", "X-metadata-token"
AWS_TTL, AWS_TOKEN = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def service(document: Any = DOCUMENT, version: str = "V1", **options: Any) -> Mmds:
    store = Mmds()
    store.configure(MmdsConfig(["eth0"], version=version, **options))
    store.put(document)
    return store


def ask(store: Mmds, request: str, *headers: str, end: str = "\r\n\r\n") -> tuple[int, str, dict[str, str]]:
    """The answer to one request, which `store` takes whole."""
    data = "\r\n".join([request, *headers]).encode() + end.encode()
    used, answer, last = store.serve(data)
    assert used == len(data)
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    protocol, status, _ = first.split(" ", 2)
    assert protocol == "HTTP/1.1"
    named = dict(line.split(": ", 1) for line in lines)
    assert int(named["Content-Length"]) == len(body)
    assert named["Connection"] == ("close" if last else "keep-alive")
    return int(status), body.decode(), named


def get(store: Mmds, path: str, *headers: str) -> tuple[int, str]:
    return ask(store, f"GET {path} HTTP/1.1", *headers)[:2]


def token(store: Mmds, ttl: object = 60) -> str:
    status, body, headers = ask(store, "PUT /latest/api/token HTTP/1.1", f"{TTL}: {ttl}")
    assert status == 200, body
    assert headers["Content-Type"] == "text/plain"
    return body


# The document


def test_there_is_an_empty_one_before_the_first() -> None:
    store = Mmds()
    assert store.get() == {}
    with pytest.raises(MmdsError, match=r"^MMDS error: The MMDS data store is not initialized.$"):
        store.patch({"a": 1})
    assert get(store, "/") == (501, "Cannot retrieve value. The value has an unsupported type.")
    assert get(store, "/a") == (404, "Resource not found: /a.")
    store.put(None)
    store.patch([3])
    assert store.get() == [3]


# RFC 7396, Appendix A.
@pytest.mark.parametrize(
    ("original", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, {}),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_rfc_7396(original: Any, patch: Any, result: Any) -> None:
    store = service(original)
    store.patch(patch)
    assert store.get() == result


@given(json_values, json_values)
def test_a_patch_is_applied_once_and_leaves_no_null_of_its_own(original: Any, patch: Any) -> None:
    store = service(original)
    before = store.get()
    kept = json.dumps(before)
    store.patch(patch)
    once = store.get()
    store.patch(patch)
    assert store.get() == once
    assert json.dumps(before) == kept, "who has read the document must not see it change"
    if isinstance(patch, dict) and isinstance(once, dict):
        assert not [key for key, value in patch.items() if value is None and key in once]


@given(json_values)
def test_the_document_is_what_was_put(value: Any) -> None:
    store = service(value)
    assert store.get() == ({} if value is None else value)
    status, body = get(store, "/", "Accept: application/json")
    assert (status, json.loads(body)) == (200, value)


def test_the_document_is_a_copy() -> None:
    document: Any = {"z": [1], "a": 2}
    store = service(document)
    document["z"].append(2)
    assert list(store.get().items()) == [("a", 2), ("z", [1])]  # type: ignore[union-attr]


def test_the_limit_is_of_the_json_text() -> None:
    store = Mmds(limit=20)
    with pytest.raises(MmdsError, match=r"^MMDS limit exceeded error: The MMDS patch request doesn't fit.$") as error:
        store.put({"a": "x" * 13})
    assert error.value.status == 413
    store.put({"a": "x" * 12})
    with pytest.raises(MmdsError) as error:
        store.patch({"b": 1})
    assert error.value.status == 413
    assert store.get() == {"a": "x" * 12}
    store.patch({"a": None, "b": 1})
    assert store.get() == {"b": 1}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def test_depth_is_bounded() -> None:
    store = service(nested(127))
    for change in (store.put, store.patch):
        with pytest.raises(MmdsError, match="recursion limit exceeded"):
            change(nested(128))
        with pytest.raises(MmdsError, match="recursion limit exceeded"):
            change(nested(50_000))
    assert get(store, "/a" * 127, "Accept: application/json") == (200, "1")


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), b"", {1: 2}, "\ud800", {"\udfff": 1}, object(), 1 << 2000]
)
def test_what_is_no_json_is_refused(value: Any) -> None:
    store = service({"a": 1})
    with pytest.raises(MmdsError, match="is not JSON"):
        store.put(value)
    assert store.get() == {"a": 1}


def test_a_large_number_becomes_one_with_a_point() -> None:
    store = service({"b": 123456789012345678901234567890, "c": 1.0, "y": 1e16})
    expected = '{"b":1.2345678901234568e29,"c":1.0,"y":1e16}'  # Firecracker 1.12.1's own words
    assert get(store, "/", "Accept: application/json") == (200, expected)


# What the guest is told


@pytest.mark.parametrize(
    ("path", "text", "as_json"),
    [
        ("/", "a/b/\nage\nempty/\nmember\nname/\nnone\nphones\nshare", WHOLE),
        ("/name", "first\nsecond", '{"first":"John","second":"Doe"}'),
        ("/name/", "first\nsecond", '{"first":"John","second":"Doe"}'),
        ("//name///first", "John", '"John"'),
        ("/name/first/", "John", '"John"'),
        ("http://169.254.169.254/name/first", "John", '"John"'),
        ("/phones/0", "+401234567", '"+401234567"'),
        ("/phones/1", "home", '{"home":"+441234567"}'),
        ("/a~1b", "~", '{"~":"tilde"}'),
        ("/a~1b/~0", "tilde", '"tilde"'),
        ("/empty", "", "{}"),
        ("/age", None, "43"),
        ("/phones", None, '["+401234567",{"home":"+441234567"}]'),
        ("/member", None, "false"),
        ("/share", None, "12.12"),
        ("/none", None, "null"),
    ],
)  # fmt: skip
def test_text_and_json(path: str, text: str | None, as_json: str) -> None:
    store = service()
    unsupported = 501, "Cannot retrieve value. The value has an unsupported type."
    for headers in ([], ["Accept: */*"], ["Accept: text/plain"], ["Accept: application/json, */*"]):
        assert get(store, path, *headers) == (unsupported if text is None else (200, text))
    for accept in ("application/json", "APPLICATION/JSON "):
        status, body, headers_back = ask(store, f"GET {path} HTTP/1.1", f"Accept: {accept}")
        assert (status, body, headers_back["Content-Type"]) == (200, as_json, "application/json")


@pytest.mark.parametrize(
    "path", ["/nowhere", "/name/first/x", "/phones/2", "/phones/-1", "/phones/00", "/phones/+0",
             "/phones/99999999999999", "/name?x=1", "/a/b", "/phones/\N{ARABIC-INDIC DIGIT ZERO}"]
)  # fmt: skip
def test_what_is_not_there(path: str) -> None:
    status, body = get(service(), path)
    assert (status, body) == (404, f"Resource not found: {path}.") or (not path.isascii() and status == 400)


def test_imds_compat_is_text_always() -> None:
    store = service(imds_compat=True)
    assert get(store, "/name/first", "Accept: application/json") == (200, "John")


@given(json_values)
def test_every_path_leads_somewhere(document: Any) -> None:
    store = service(document)

    def walk(value: Any, path: str) -> None:
        if "//" in path or not path.isascii() or not path.isprintable() or set(path) & set(' "<>\\^`{|}#?'):
            return  # no such path can be asked for
        if path.endswith("/"):
            return  # of an empty key, which a path cannot tell from its parent
        status, body = get(store, path or "/", "Accept: application/json")
        assert (status, json.loads(body)) == (200, value)
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            walk(child, f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}")

    walk(document, "")


def test_v1_only_gives() -> None:
    store = service()
    for method in ("PUT", "PATCH"):
        status, body, headers = ask(store, f"{method} /latest/api/token HTTP/1.1", f"{TTL}: 60")
        assert (status, body, headers["Allow"]) == (405, "Not allowed HTTP method.", "GET")
    assert get(store, "/name/first", f"{TTL}: nonsense", f"{TOKEN}: nonsense") == (200, "John")


@pytest.mark.parametrize(
    ("ttl_name", "token_name"), [(TTL, TOKEN), (AWS_TTL, AWS_TOKEN), (TTL.lower(), AWS_TOKEN.upper())]
)
def test_v2_gives_for_a_token(ttl_name: str, token_name: str) -> None:
    store = service(version="V2")
    no_token = "No MMDS token provided. Use `X-metadata-token` header to specify the session token."
    assert get(store, "/name/first") == (401, no_token)
    status, body, _ = ask(store, "PUT /latest/api//token HTTP/1.1", f"{ttl_name}: 21600", "Content-Length: 0")
    assert status == 200
    assert get(store, "/name/first", f"{token_name}: {body}") == (200, "John")
    assert get(store, "/nowhere", f"{token_name}: {body}") == (404, "Resource not found: /nowhere.")


def test_v2_refuses() -> None:
    store = service(version="V2")
    path = "PUT /latest/api/token HTTP/1.1"
    no_ttl = (
        "Token time to live value not found. Use `X-metadata-token-ttl-seconds` header to specify the token's lifetime."
    )
    assert ask(store, path)[:2] == (400, no_ttl)
    for ttl in ("0", "21601", "4294967295"):
        problem = f"Invalid time to live value provided for token: {ttl}. Please provide a value between 1 and 21600."
        assert ask(store, path, f"{TTL}: {ttl}")[:2] == (400, problem)
    for ttl in ("", "-1", "+", "++1", "x", "1.5", "4294967296", "9" * 500, "\N{ARABIC-INDIC DIGIT ONE}"):
        status, body, _ = ask(store, path, f"{TTL}: {ttl}")
        assert status == 400
        assert body.startswith("Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:")
    problem = "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For"
    assert ask(store, path, f"{TTL}: 60", "x-forwarded-for: 1.2.3.4")[:2] == (400, problem)
    assert ask(store, "PUT /token HTTP/1.1", f"{TTL}: 60")[:2] == (404, "Resource not found: /token.")
    status, body, headers = ask(store, "PATCH / HTTP/1.1")
    assert (status, body, headers["Allow"]) == (405, "Not allowed HTTP method.", "GET, PUT")
    for wrong in ("", "foo", "a" * 48, "a" * 58, token(service(version="V2")), token(store)[:-1] + "\xe9"):
        assert get(store, "/name", f"{TOKEN}: {wrong}") == (401, "MMDS token not valid.")


def test_a_token_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    store = service(version="V2")
    now = time.monotonic()
    assert token(store, "+5")
    monkeypatch.setattr(time, "monotonic", lambda: now)
    mine = token(store, 2)
    now += 1.9
    assert store.is_valid_token(mine)
    now += 0.2
    assert not store.is_valid_token(mine)
    assert get(store, "/name", f"{TOKEN}: {mine}") == (401, "MMDS token not valid.")


@given(st.integers(0, 47), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"))
def test_a_token_that_was_touched_is_none(at: int, char: str) -> None:
    store = service(version="V2")
    mine = token(store)
    other = mine[:at] + char + mine[at + 1 :]
    assert store.is_valid_token(other) == (other == mine)


def test_a_token_is_of_one_instance() -> None:
    store = service(version="V2")
    mine = token(store)
    store.configure(MmdsConfig(["eth0"], version="V2"))
    assert store.is_valid_token(mine)
    store.instance_id = "another"
    assert not store.is_valid_token(mine)
    store.configure(MmdsConfig(["eth0"], version="V1"))
    assert not store.is_valid_token(mine)


# HTTP


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        ("GET / HTTP/1.2", [], 501),
        ("POST / HTTP/1.1", [], 501),
        ("HEAD / HTTP/1.1", [], 501),
        ("CONNECT a:1 HTTP/1.1", [], 501),
        ("get / HTTP/1.1", [], 501),
        ("GET /", [], 400),
        ("GET /a b HTTP/1.1", [], 400),
        ("GET http:// HTTP/1.1", [], 400),
        ("GET http://169.254.169.254 HTTP/1.1", [], 400),
        ("GET / HTTP/1.1", ["no colon"], 400),
        ("GET / HTTP/1.1", [" folded: x"], 400),
        ("GET / HTTP/1.1", ["a\0b: x"], 400),
        ("GET / HTTP/1.1", ["Content-Length: -1"], 400),
        ("GET / HTTP/1.1", ["Content-Length: 99999999999999999999"], 400),
        ("GET / HTTP/1.1", ["Content-Length: 1", "Content-Length: 2"], 400),
        ("GET / HTTP/1.1", ["Content-Length: 5000"], 413),
        ("PUT / HTTP/1.1", ["Transfer-Encoding: chunked"], 400),
    ],
)
def test_what_is_no_request_ends_the_connection(request_line: str, headers: list[str], status: int) -> None:
    found, _, named = ask(service(), request_line, *headers)
    assert (found, named["Connection"]) == (status, "close")


def test_an_offer_of_another_protocol_is_ignored() -> None:
    """Java's HttpClient makes it with its first request."""
    offer = "Connection: Upgrade, HTTP2-Settings", "Content-Length: 0", "HTTP2-Settings: AAEA", "Upgrade: h2c"
    found, body, named = ask(service(), "GET /name/first HTTP/1.1", *offer)
    assert (found, body, named["Connection"]) == (200, "John", "keep-alive")


def test_lines_without_a_carriage_return_are_no_request() -> None:
    assert ask(service(), "GET / HTTP/1.1", end="\n\n")[0] == 400


def test_a_request_may_come_in_pieces_with_another_behind_it() -> None:
    store = service()
    first = b"\r\nGET /name/first HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    second = b"GET /age HTTP/1.0\r\n\r\n"
    for size in range(len(first)):
        assert store.serve(first[:size]) == (0, b"", False)
    used, answer, last = store.serve(first + second)
    assert (used, answer.endswith(b"\r\n\r\nJohn"), last) == (len(first), True, False)
    used, answer, last = store.serve(second)
    assert (used, answer[:12], last) == (len(second), b"HTTP/1.1 501", True)


def test_a_request_without_an_end_is_refused_in_time() -> None:
    store = service()
    assert store.serve(b"x" * (MAX_REQUEST - 1)) == (0, b"", False)
    used, answer, last = store.serve(b"x" * MAX_REQUEST)
    assert (used, answer[:12], last) == (MAX_REQUEST, b"HTTP/1.1 413", True)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_have_an_answer(data: bytes, begin: bool) -> None:
    store = service(version="V2")
    if begin:
        data = b"GET /" + data
    used, answer, last = store.serve(data + b"\r\n\r\n")
    assert 0 <= used <= len(data) + 4
    assert answer.startswith(b"HTTP/1.1 ") or not used
    assert last or used or not answer


# The configuration


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.0.1", "169.254.255.255", "169.254.1", "169.254.1.256",
                                     "169.254.01.1", "bad", "", "169.254.1.1.1", "169.254.1.-1"])  # fmt: skip
def test_the_address_is_link_local(address: str) -> None:
    with pytest.raises(ConfigError, match="The MMDS IPv4 address is not link local"):
        MmdsConfig(["eth0"], address=address)


@pytest.mark.parametrize("address", ["169.254.1.0", "169.254.254.255", "169.254.169.254"])
def test_addresses_that_are(address: str) -> None:
    assert MmdsConfig(["eth0"], address=address).address == address


def test_the_interfaces_are_there() -> None:
    with pytest.raises(ConfigError, match="that allow forwarding MMDS requests is empty"):
        MmdsConfig([])
    with pytest.raises(ConfigError, match="V1 or V2"):
        MmdsConfig(["eth0"], version="V3")
    nets = [NetConfig("tap0"), NetConfig("tap1", id="second")]
    for names in (["eth0"], ["second"], ["eth0", "second"]):
        assert VmConfig("vmlinux", nets=nets, mmds=MmdsConfig(names)).mmds is not None
    for names in (["eth1"], ["eth0", "third"]):
        with pytest.raises(ConfigError, match="at least one ID that does not correspond to any existing"):
            VmConfig("vmlinux", nets=nets, mmds=MmdsConfig(names))
