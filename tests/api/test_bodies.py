# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests: what a refusal says is allowed, beside msgspec's own view of each type; and first uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect
import pytest

from vmm.api import bodies
from vmm.api.actions import ACTIONS, Route

ROOT = Path(__file__).parents[2]
KINDS = [kind for route in ACTIONS.values() for kind in (route.body, route.result)]
BODIES = [kind for kind in KINDS if hasattr(kind, "__struct_fields__")]


def _compare(kind: Any, path: str, info: Any) -> None:
    options = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    words = [value for each in options if isinstance(each, msgspec.inspect.LiteralType) for value in each.values]
    fields = next((each.fields for each in options if hasattr(each, "fields")), ())
    assert bodies._words(kind, path) == words
    assert list(bodies._fields(kind, path)) == [each.encode_name for each in fields]
    for each in fields:
        _compare(kind, f"{path}.{each.encode_name}", each.type)
    for each in options:
        if hasattr(each, "item_type"):
            _compare(kind, f"{path}[0]", each.item_type)


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_what_a_refusal_calls_allowed_is_what_msgspec_allows(kind: Any) -> None:
    _compare(kind, "", msgspec.inspect.type_info(kind))
    assert bodies._type_at(kind, ".nothing") is None
    assert bodies._type_at(kind, "[0].nothing") is None


@pytest.mark.parametrize("route", [each for each in ACTIONS.values() if each.path], ids=lambda each: each.action)
def test_who_handles_a_route_says_the_types_that_the_route_has(route: Route) -> None:
    # Between the two every body is of any type, so that mypy compares nothing.
    for text, kind in zip(route.do.__annotations__.values(), (route.body, route.result), strict=True):
        if kind is not Any:
            assert text.removeprefix("types.") == ("None" if kind is None else kind.__name__)


FIRST_USES = """
import gc, sys
sys.path += PATH
gc.disable()
from vmm import launched
launched.spare_threading()
import vmm.commands.cli, vmm.commands.serve, vmm.unix_socket
launched.spare_httptools()
import vmm.api.server
launched.spare_msgspec()
from vmm.api import actions, answer
served = actions.Vmm("first", on_start=None, boot_timer=False, mmds_limit=1 << 10)
launched.spare_collections("vmm.machine.machine")
import vmm.machine.machine, vmm.jail.preload
vmm.jail.preload.preload_later()
known = set(sys.modules)
for method, path, body, status in REQUESTS:
    got, text, _ = answer.answer(served, method, path, body)
    assert got == status, (method, path, got, text)
print(*sorted(set(sys.modules) - known), file=sys.stderr)
"""
LIMITS = '{"bandwidth": {"size": 1, "refill_time": 1}}'
REQUESTS = [
    ("GET", "/", "", 200),
    ("GET", "/version", "", 200),
    ("GET", "/vm/config", "", 200),
    ("PUT", "/logger", '{"level": "Info"}', 204),
    ("PUT", "/boot-source", '{"kernel_image_path": "KERNEL"}', 204),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 64}', 204),
    ("PATCH", "/machine-config", '{"vcpu_count": 2}', 204),
    ("GET", "/machine-config", "", 200),
    ("PUT", "/drives/d", '{"drive_id": "d", "path_on_host": "KERNEL", "is_root_device": false}', 204),
    ("PUT", "/network-interfaces/n", f'{{"iface_id": "n", "mode": "user", "rx_rate_limiter": {LIMITS}}}', 204),
    ("PUT", "/vsock", '{"guest_cid": 3, "uds_path": "DIR/v"}', 204),
    ("PUT", "/balloon", '{"amount_mib": 0, "deflate_on_oom": true}', 204),
    ("PUT", "/entropy", "{}", 204),
    ("PUT", "/mmds/config", '{"network_interfaces": ["n"]}', 204),
    ("PUT", "/mmds", '{"a": "b"}', 204),
    ("GET", "/vm/config", "", 200),
    ("PUT", "/drives/d", '{"nothing": 1}', 400),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "4M"}', 400),
    ("PATCH", "/vm", '{"state": "Paused"}', 400),
    ("PUT", "/nothing", "{}", 400),
]


def test_the_first_request_of_each_kind_imports_no_more_than_its_device(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(512))
    asked = [
        (how, path, body.replace("KERNEL", str(kernel)).replace("DIR", str(tmp_path)).encode(), status)
        for how, path, body, status in REQUESTS
    ]
    places = [str(ROOT), str(Path(msgspec.__file__).parents[1])]
    code = FIRST_USES.replace("PATH", repr(places)).replace("REQUESTS", repr(asked))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = done.stderr.split()
    assert "virtio.vsock.device" in imported
    assert {name for name in imported if not name.startswith(("virtio", "vmm.", "_"))} == set()
