# SPDX-License-Identifier: Apache-2.0
"""What a client may send, right, wrong and out of order, as hypothesis strategies."""

from __future__ import annotations

import copy
import json
from typing import Any, NamedTuple

from hypothesis import strategies as st

GUEST_FILES = ("kernel", "initrd", "junk", "empty", "a.img", "b.img", "odd.img", "log", "log2", "metrics")
INTERRUPTED = b'{"vcpu_count": 1, "mem'


class Request(NamedTuple):
    """One request; a `body` of None sends no body."""

    method: str
    path: str
    body: bytes | None = None

    def __str__(self) -> str:
        body = "" if self.body is None else " " + self.body.decode("utf-8", "backslashreplace")
        return f"{self.method} {self.path}{body}"

    def __repr__(self) -> str:
        return str(self)


def put(path: str, body: object) -> Request:
    """A PUT of a value."""
    return Request("PUT", path, json.dumps(body).encode())


def patch(path: str, body: object) -> Request:
    """A PATCH with a value."""
    return Request("PATCH", path, json.dumps(body).encode())


def parse(line: str) -> Request:
    """A request from its text."""
    method, path, *rest = line.split(" ", 2)
    return Request(method, path, rest[0].encode() if rest else None)


KERNEL = put("/boot-source", {"kernel_image_path": "kernel"})
START = put("/actions", {"action_type": "InstanceStart"})
PAUSE = patch("/vm", {"state": "Paused"})
RESUME = patch("/vm", {"state": "Resumed"})
CONFIG = Request("GET", "/vm/config")
GETS = tuple(Request("GET", path) for path in ("/", "/version", "/vm/config", "/machine-config", "/balloon", "/mmds"))

_SOME = st.sampled_from
_bucket = st.fixed_dictionaries(
    {"size": _SOME((1000, 0, 1, 1 << 40)), "refill_time": _SOME((100, 0, 1))},
    optional={"one_time_burst": _SOME((None, 0, 5))},
)
_limiter = st.none() | st.fixed_dictionaries(
    {}, optional={"bandwidth": st.none() | _bucket, "ops": st.none() | _bucket}
)
_id = _SOME(("a", "a", "a", "b", "r", "A_1"))
_drive = st.fixed_dictionaries(
    {
        "drive_id": _id,
        "path_on_host": _SOME(("a.img", "b.img", "a.img", "odd.img", "empty", "missing", "dir")),
        "is_root_device": _SOME((False, False, True)),
        "is_read_only": st.booleans(),
    },
    optional={
        "partuuid": _SOME((None, "0eaa91a0-01")),
        "cache_type": _SOME(("Unsafe", "Writeback")),
        "rate_limiter": _limiter,
        "io_engine": _SOME((None, "Sync", "Async")),
        "socket": st.none(),
    },
)
_interface = st.fixed_dictionaries(
    {"iface_id": _id, "host_dev_name": _SOME(("tap0", "tap1", "tap2", "tap0", "lo", "name-longer-than-15"))},
    optional={
        "guest_mac": _SOME(("06:00:00:00:00:01", "06:00:00:00:00:02", "AA:BB:CC:DD:EE:FF", "06:00:00:00:00", None)),
        "rx_rate_limiter": _limiter,
        "tx_rate_limiter": _limiter,
    },
)
_vcpus = _SOME((1, 2, 3, 1, 0, 33))
_memory = _SOME((128, 64, 32, 3, 0))
_machine = {
    "smt": st.booleans(),
    "cpu_template": _SOME((None, "None")),
    "track_dirty_pages": st.booleans(),
    "huge_pages": _SOME(("None", "None", "2M")),
}
_mmds_value = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | _SOME(("", "x", "\u00e9")),
    lambda inner: st.dictionaries(_SOME(("a", "b", "c")), inner, max_size=2) | st.lists(inner, max_size=2),
    max_leaves=4,
)
_mmds = st.dictionaries(_SOME(("a", "b", "latest")), _mmds_value, max_size=3) | _mmds_value
_fields = st.fixed_dictionaries
# (method, path, strategy of the body, weight): a {name} in the path is that field of the body.
BODIES: tuple[tuple[str, str, st.SearchStrategy[Any], int], ...] = (
    ("PUT", "/boot-source", _fields(
        {"kernel_image_path": _SOME(("kernel", "kernel", "kernel", "junk", "empty", "missing", "dir"))},
        optional={
            "initrd_path": _SOME((None, "initrd", "missing")), "boot_args": _SOME((None, "", "quiet", "x" * 2048)),
        },
    ), 2),
    ("PUT", "/machine-config", _fields({"vcpu_count": _vcpus, "mem_size_mib": _memory}, optional=_machine), 3),
    ("PATCH", "/machine-config", _fields(
        {}, optional={"vcpu_count": _vcpus, "mem_size_mib": _memory, **_machine}
    ), 2),
    ("PUT", "/cpu-config", _fields(
        {}, optional={"kvm_capabilities": _SOME(([], ["!56"], ["56"], ["x"])), "msr_modifiers": st.just([])}
    ), 1),
    ("PUT", "/drives/{drive_id}", _drive, 6),
    ("PATCH", "/drives/{drive_id}", _fields(
        {"drive_id": _id},
        optional={
            "path_on_host": _SOME(("b.img", "a.img", "odd.img", "missing", None)), "rate_limiter": _limiter,
        },
    ), 5),
    ("PUT", "/network-interfaces/{iface_id}", _interface, 5),
    ("PATCH", "/network-interfaces/{iface_id}", _fields(
        {"iface_id": _id}, optional={"rx_rate_limiter": _limiter, "tx_rate_limiter": _limiter}
    ), 3),
    ("PUT", "/vsock", _fields(
        {
            "guest_cid": _SOME((3, 4, 0xFFFFFFFE)),
            "uds_path": _SOME(("v.sock", "w.sock", "./v.sock", "no/v.sock", "dir")),
        },
        optional={"vsock_id": _SOME((None, "vsock0"))},
    ), 3),
    ("PUT", "/balloon", _fields(
        {"amount_mib": _SOME((0, 1, 64, 128, 129)), "deflate_on_oom": st.booleans()},
        optional={"stats_polling_interval_s": _SOME((0, 1, 65535))},
    ), 3),
    ("PATCH", "/balloon", _fields({"amount_mib": _SOME((0, 1, 64, 128, 129))}), 2),
    ("PATCH", "/balloon/statistics", _fields({"stats_polling_interval_s": _SOME((0, 1, 2))}), 2),
    ("PUT", "/entropy", _fields({}, optional={"rate_limiter": _limiter}), 2),
    ("PUT", "/logger", _fields({}, optional={
        "log_path": _SOME((None, "log", "log2", "missing", "dir")),
        "level": _SOME((None, "Error", "Warning", "warn", "Info", "DEBUG", "off", "Trace", "loud")),
        "show_level": st.none() | st.booleans(), "show_log_origin": st.none() | st.booleans(),
        "module": _SOME((None, "api_server")),
    }), 2),
    ("PUT", "/metrics", _fields({"metrics_path": _SOME(("metrics", "metrics", "missing", "dir"))}), 2),
    ("PUT", "/mmds/config", _fields(
        {"network_interfaces": st.lists(_id, max_size=2)},
        optional={
            "version": _SOME(("V1", "V2")),
            "ipv4_address": _SOME((None, "169.254.169.254", "169.254.1.1", "10.0.0.1", "169.254.0.1", "not one")),
        },
    ), 3),
    ("PUT", "/mmds", _mmds, 2),
    ("PATCH", "/mmds", _mmds, 2),
    ("PATCH", "/vm", _fields({"state": _SOME(("Paused", "Resumed"))}), 4),
    ("PUT", "/actions", _fields({"action_type": _SOME(("FlushMetrics", "SendCtrlAltDel", "InstanceStart"))}), 2),
    ("PUT", "/snapshot/create", _fields(
        {"snapshot_path": st.just("snap"), "mem_file_path": st.just("mem")},
        optional={"snapshot_type": _SOME(("Full", "Diff"))},
    ), 1),
)  # fmt: skip

# What makes a body unreadable by itself.
_UNREADABLE = ('"06:00:00:00:00"', '["x"]', '"loud"', '"not one"')
_WRONG: tuple[Any, ...] = (
    None, True, "x", "", 1, -1, 0, 1.5, [], {}, ["x"], {"x": 1}, 1 << 8, 1 << 16, 1 << 32, 1 << 64, "1", "None",
)  # fmt: skip
_PATHS = (
    *dict.fromkeys(path.split("/{")[0] for _, path, _, _ in BODIES),
    "/", "/version", "/vm/config", "/balloon/statistics", "/mmds/a", "/mmds/config/", "/nope", "//", "/drives/",
    "/drives/a", "/drives/a/b", "/drives/a-b", "/network-interfaces/a", "/network-interfaces/a/", "/machine-config/",
    "/vm/", "/snapshot", "/snapshot/load", "/snapshot/other", "/balloon/other", "/serial/x", "/pmem/a",
    "/hotplug/memory", "/version?x=1",
)  # fmt: skip
_RAW = (
    None, b"", b"{}", b"{", b"[]", b"null", b"junk", b"{} {}", b'{"x": 1}', b'"x"', b"1", INTERRUPTED,
    b'{"a": "\xff"}', b"[" * 300, b'{"drive_id": "a", "drive_id": "a"}', b'{"vcpu_count": 1, "mem_size_mib": 128,}',
    b'{"amount_mib": 1, "amount_mib": 2, "deflate_on_oom": true}',
)  # fmt: skip


def _as_request(draw: st.DrawFn, method: str, path: str, body: Any) -> Request:
    head, brace, name = path.partition("{")
    if brace:
        inside = body.get(name.rstrip("}")) if isinstance(body, dict) else None
        if not isinstance(inside, str) or draw(_SOME((*(False,) * 19, True))):
            inside = draw(_SOME(("b", "a", "a-b", "a.b", "", "zz")))
        path = head + inside
    return Request(method, path, json.dumps(body).encode())


@st.composite
def _valid(draw: st.DrawFn) -> Request:
    method, path, body, _ = draw(_SOME([row for row in BODIES for _ in range(row[3])]))
    return _as_request(draw, method, path, draw(body))


@st.composite
def _damaged(draw: st.DrawFn) -> Request:
    # A body with one thing wrong: with two, which one is told of is nobody's business.
    method, path, strategy, _ = draw(_SOME(BODIES))
    whole = strategy.filter(
        lambda body: isinstance(body, dict) and not any(each in json.dumps(body) for each in _UNREADABLE)
    )
    body = copy.deepcopy(draw(whole))
    inside = body
    while True:
        deeper = [value for value in inside.values() if isinstance(value, dict) and value]
        if not deeper or draw(st.booleans()):
            break
        inside = draw(_SOME(deeper))
    what = draw(_SOME(("drop", "add", "wrong", "wrong", "wrong")))
    if what == "add" or not inside:
        inside["unknown"] = draw(_SOME((1, None, "x")))
    elif what == "drop":
        del inside[draw(_SOME(sorted(inside)))]
    else:
        inside[draw(_SOME(sorted(inside)))] = draw(_SOME(_WRONG))
    return _as_request(draw, method, path, body)


_odd = st.builds(Request, _SOME(("GET", "PUT", "PATCH")), _SOME(_PATHS), _SOME(_RAW))
_get = _SOME((*GETS, Request("GET", "/balloon/statistics")))
_kinds = (*([_valid()] * 14), *([_damaged()] * 4), _odd, _get)
request = _SOME(range(len(_kinds))).flatmap(lambda number: _kinds[number])


@st.composite
def sequences(draw: st.DrawFn) -> list[Request]:
    """Requests before the start, mostly a start, requests after it."""
    before = draw(st.lists(request, max_size=8))
    if not draw(_SOME((True, True, True, False))):
        return before
    return [*before, KERNEL, START, *draw(st.lists(request, max_size=8))]
