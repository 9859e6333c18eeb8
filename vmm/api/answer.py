# SPDX-License-Identifier: Apache-2.0
"""From a request to its answer: parsed, done, logged, counted; no mistake of a client's or of ours ends the server."""

from __future__ import annotations

import sys
import time
from typing import Any

import msgspec

from vmm import logger
from vmm.api import ApiError, FatalError, types
from vmm.api.bodies import encode
from vmm.api.routes import parse
from vmm.observe.metrics import FIELDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.api.actions import Vmm
    from vmm.observe.metrics import Metrics

# How the metrics call what a request is about: a field of {put,get,patch}_api_requests is NAME_count or NAME_fails.
_METRICS = {
    "": "instance_info", "version": "vmm_version", "actions": "actions", "boot-source": "boot_source",
    "drives": "drive", "logger": "logger", "machine-config": "machine_cfg", "cpu-config": "cpu_cfg",
    "metrics": "metrics", "network-interfaces": "network", "mmds": "mmds", "vsock": "vsock",
}  # fmt: skip
# As the log names statuses.
_REASON = {200: "OK", 204: "No Content", 400: "Bad Request", 413: "Payload Too Large", 500: "Internal Server Error"}
PROMETHEUS = "Content-Type: text/plain; version=0.0.4"


def _count(metrics: Metrics, method: str, path: str, *, failed: bool) -> None:
    group = f"{method.lower()}_api_requests"
    name = _METRICS.get(path.split("/")[1] if path.startswith("/") else path)
    for suffix in ("count", "fails") if failed else ("count",):
        if f"{name}_{suffix}" in FIELDS.get(group, ()):
            metrics.count(group, f"{name}_{suffix}")


def answer(vmm: Vmm, method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
    """What ``vmm.api.server.Server`` asks: request in, answer out, for `vmm`."""
    begun = time.monotonic_ns()
    if logger.enabled(logger.INFO):
        shown = f" with body {_quoted(body.decode(errors='replace'))}" if body and path != "/mmds" else ""
        logger.info(f"The API server received a {method.capitalize()} request on {_quoted(path)}{shown}.")
    status, answered, headers = _answer(vmm, method, path, body)
    _count(vmm.metrics, method, path, failed=status >= 400)
    told = f"Status code: {status} {_REASON.get(status, '')}."
    if status >= 400:
        fault = msgspec.json.decode(answered, type=types.Fault).fault_message
        logger.error(f"Received Error. {told} Message: {fault}")
    else:
        logger.info(f"The request was executed successfully. {told}")
    if logger.enabled(logger.DEBUG):
        logger.debug(f"Total previous API call duration: {(time.monotonic_ns() - begun) // 1000} us.")
    return status, answered, headers


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _answer(vmm: Vmm, method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
    headers: tuple[str, ...] = ()
    try:
        action, asked = parse(method, path, body)
        if _deprecated(asked):
            headers = ("Deprecation: true",)
            vmm.metrics.count("deprecated_api", "deprecated_http_api_calls")
        result = vmm.handle(action, asked)
    except ApiError as error:
        vmm.lost = vmm.lost or isinstance(error, FatalError)
        return error.status, encode(types.Fault(fault_message=str(error))), headers
    except Exception as error:  # a mistake of ours must cost neither the VM nor the API
        sys.excepthook(*sys.exc_info())
        return 500, encode(types.Fault(fault_message=f"Internal error: {type(error).__name__}: {error}")), ()
    if action == "GetPrometheusMetrics":
        return 200, str(result).encode(), (PROMETHEUS,)
    return (204, b"", headers) if result is None else (200, encode(result), headers)


def _deprecated(body: Any) -> bool:
    # Whether it sets a field that clients should do without, as Firecracker tells them.
    match body:
        case types.Vsock():
            return body.vsock_id not in (None, msgspec.UNSET)
        case types.MachineConfiguration() | types.MachineConfigurationUpdate():
            return body.cpu_template not in (None, msgspec.UNSET)
        case types.SnapshotLoad():
            return body.mem_file_path is not None and body.mem_backend is None
        case types.MmdsConfig():
            return body.version == "V1"
        case _:
            return False
