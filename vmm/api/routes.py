# SPDX-License-Identifier: Apache-2.0
"""Which request is which action: the table that the server answers by and the OpenAPI document is made of."""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import msgspec

from vmm import logger
from vmm.api import types
from vmm.api.actions import ApiError, Vmm, VmmAction
from vmm.metrics import FIELDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.metrics import Metrics



class Route(NamedTuple):
    """One request.

    :param method: GET, PUT or PATCH
    :param path: ``{name}`` stands for an id, which must be the body's field of that name
    :param action: its name; of ``/actions``, the body says which
    :param body: type of the request's body, or None
    :param result: type of the answer's body, or None: 204
    """

    method: str
    path: str
    action: str
    body: Any = None
    result: Any = None


ROUTES = (
    Route("GET", "/", "GetVmInstanceInfo", None, types.InstanceInfo),
    Route("GET", "/version", "GetVmmVersion", None, types.Version),
    Route("GET", "/vm/config", "GetFullVmConfig", None, types.VmConfiguration),
    Route("PATCH", "/vm", "SetVmState", types.VmState),
    Route("PUT", "/actions", "", types.Action),
    Route("PUT", "/boot-source", "ConfigureBootSource", types.BootSource),
    Route("GET", "/machine-config", "GetVmMachineConfig", None, types.MachineConfiguration),
    Route("PUT", "/machine-config", "PutMachineConfiguration", types.MachineConfiguration),
    Route("PATCH", "/machine-config", "UpdateMachineConfiguration", types.MachineConfigurationUpdate),
    Route("PUT", "/cpu-config", "PutCpuConfiguration", types.CpuConfig),
    Route("PUT", "/drives/{drive_id}", "InsertBlockDevice", types.Drive),
    Route("PATCH", "/drives/{drive_id}", "UpdateBlockDevice", types.PartialDrive),
    Route("PUT", "/network-interfaces/{iface_id}", "InsertNetworkDevice", types.NetworkInterface),
    Route("PATCH", "/network-interfaces/{iface_id}", "UpdateNetworkInterface", types.PartialNetworkInterface),
    Route("PUT", "/vsock", "SetVsockDevice", types.Vsock),
    Route("GET", "/balloon", "GetBalloonConfig", None, types.Balloon),
    Route("PUT", "/balloon", "SetBalloonDevice", types.Balloon),
    Route("PATCH", "/balloon", "UpdateBalloon", types.BalloonUpdate),
    Route("GET", "/balloon/statistics", "GetBalloonStats", None, types.BalloonStats),
    Route("PATCH", "/balloon/statistics", "UpdateBalloonStatistics", types.BalloonStatsUpdate),
    Route("PUT", "/entropy", "SetEntropyDevice", types.EntropyDevice),
    Route("PUT", "/fs/{tag}", "InsertFsDevice", types.SharedFs),
    Route("PATCH", "/fs/{tag}", "UpdateFsDevice", types.PartialFs),
    Route("GET", "/mmds", "GetMMDS", None, Any),
    Route("PUT", "/mmds", "PutMMDS", Any),
    Route("PATCH", "/mmds", "PatchMMDS", Any),
    Route("PUT", "/mmds/config", "SetMmdsConfiguration", types.MmdsConfig),
    Route("PUT", "/logger", "ConfigureLogger", types.Logger),
    Route("PUT", "/metrics", "ConfigureMetrics", types.Metrics),
    Route("PUT", "/serial", "ConfigureSerial", types.Serial),
    Route("GET", "/metrics/prometheus", "GetPrometheusMetrics", None, str),
    Route("GET", "/openapi.json", "GetOpenApi", None, Any),
    Route("PUT", "/snapshot/create", "CreateSnapshot", types.SnapshotCreate),
    Route("PUT", "/snapshot/load", "LoadSnapshot", types.SnapshotLoad),
)
_START = {"InstanceStart": "StartMicroVm"}
# How the metrics call what a request is about: a field of {put,get,patch}_api_requests is NAME_count or NAME_fails.
_METRICS = {
    "": "instance_info", "version": "vmm_version", "actions": "actions", "boot-source": "boot_source",
    "drives": "drive", "logger": "logger", "machine-config": "machine_cfg", "cpu-config": "cpu_cfg",
    "metrics": "metrics", "network-interfaces": "network", "mmds": "mmds", "vsock": "vsock",
}  # fmt: skip
# As the log names statuses.
_REASON = {200: "OK", 204: "No Content", 400: "Bad Request", 413: "Payload Too Large", 500: "Internal Server Error"}
PROMETHEUS = "Content-Type: text/plain; version=0.0.4"


def _key(method: str, path: str) -> tuple[str, ...]:
    return (method, *("{" if part.startswith("{") else part for part in path.strip("/").split("/")))


_BY_KEY = {_key(route.method, route.path): route for route in ROUTES}
_encode = msgspec.json.Encoder().encode
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def find(method: str, path: str) -> tuple[Route, str | None]:
    """The route of a request, and the id in its path.

    :raises ApiError: there is none
    """
    words = path.lstrip("/").removesuffix("/").split("/")
    if route := _BY_KEY.get((method, *words)):
        return route, None
    if len(words) <= 2 and (route := _BY_KEY.get((method, words[0], "{"))):
        identity = words[1] if len(words) == 2 else ""
        if not identity:
            raise ApiError("The ID cannot be empty.")
        if not all(char.isalnum() or char == "_" for char in identity):
            raise ApiError("API Resource IDs can only contain alphanumeric characters and underscores.")
        return route, identity
    raise ApiError(f"Invalid request method and/or path: {method} {words[0]}.")


def parse(method: str, path: str, body: bytes) -> VmmAction:
    """The action that a request means.

    :raises ApiError: it means none
    """
    if method == "GET" and body:
        raise ApiError("GET request cannot have a body.")
    if method != "GET" and not body:
        raise ApiError(f"Empty {method} request.")
    route, identity = find(method, path)
    if route.body is None:
        return VmmAction(route.action)
    value = decode(route.body, body)
    if identity is not None:
        name = route.path.partition("{")[2].rstrip("}")
        found = getattr(value, name)
        if found != identity:
            raise ApiError(f"The id from the path [{identity}] does not match the id from the body [{found}]!")
    if isinstance(value, types.MachineConfigurationUpdate) and value == types.MachineConfigurationUpdate():
        raise ApiError("Empty PATCH request.")
    action = route.action or _START.get(value.action_type, value.action_type)
    return VmmAction(action, value)


def decode(kind: Any, body: bytes) -> Any:
    """A body as a value of type `kind`.

    :raises ApiError: it is none; names the field, the value and what is allowed
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        problem = explain(kind, body, error)
        raise ApiError(f"An error occurred when deserializing the json body of a request: {problem}.") from None


def explain(kind: Any, body: bytes, error: Exception) -> str:
    """What is wrong with `body`, with the value that is, and the fields that are allowed where one is not."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return text
    problem, _, where = text.partition(" - at `")
    path = where.removesuffix("`").removeprefix("$")
    if "unknown field" in problem:
        allowed = _fields(kind, path)
        return f"{text}; allowed: {', '.join(allowed)}" if allowed else text
    if "missing required field" in problem or not path:
        return text
    try:
        value = _at(msgspec.json.decode(body), path)
    except (LookupError, TypeError, ValueError):
        return f"{path.lstrip('.')}: {problem}"  # "[...]": somewhere in a list or an object, it does not say where
    shown = _encode(value).decode()
    return f"{path.lstrip('.')} {shown if len(shown) <= 64 else shown[:61] + '...'}: {problem}"


def _at(value: Any, path: str) -> Any:
    for step in path.replace("[", ".[").split("."):
        if step:
            value = value[int(step[1:-1]) if step.startswith("[") else step]
    return value


def _fields(kind: Any, path: str) -> list[str]:
    # Of the object at `path` in a value of type `kind`, by msgspec's own view of the type.
    found: Any = msgspec.inspect.type_info(kind)
    for step in path.replace("[", ".[").split("."):
        if isinstance(found, msgspec.inspect.UnionType):
            found = next(each for each in found.types if hasattr(each, "fields") or hasattr(each, "item_type"))
        if step.startswith("["):
            found = getattr(found, "item_type", None)
        elif step:
            found = next((each.type for each in found.fields if each.encode_name == step), None)
    if isinstance(found, msgspec.inspect.UnionType):
        found = next((each for each in found.types if hasattr(each, "fields")), None)
    return [each.encode_name for each in getattr(found, "fields", ())]


def _count(metrics: Metrics, method: str, path: str, *, failed: bool) -> None:
    group = f"{method.lower()}_api_requests"
    name = _METRICS.get(path.split("/")[1] if path.startswith("/") else path)
    for suffix in ("count", "fails") if failed else ("count",):
        if f"{name}_{suffix}" in FIELDS.get(group, ()):
            metrics.count(group, f"{name}_{suffix}")


def answerer(vmm: Vmm) -> Any:
    """What ``vmm.api.server.Server`` asks: request in, answer out, for `vmm`."""

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
        begun = time.monotonic_ns()
        if logger.enabled(logger.INFO):
            shown = f" with body {_quoted(body.decode(errors='replace'))}" if body and path != "/mmds" else ""
            logger.info(f"The API server received a {method.capitalize()} request on {_quoted(path)}{shown}.")
        status, answered, headers = _answer(vmm, method, path, body)
        _count(vmm.metrics, method, path, failed=status >= 400)
        if status >= 400:
            fault = msgspec.json.decode(answered, type=types.Fault).fault_message
            logger.error(f"Received Error. Status code: {status} {_REASON.get(status, '')}. Message: {fault}")
        else:
            logger.info(f"The request was executed successfully. Status code: {status} {_REASON.get(status, '')}.")
        if logger.enabled(logger.DEBUG):
            logger.debug(f"Total previous API call duration: {(time.monotonic_ns() - begun) // 1000} us.")
        return status, answered, headers

    return answer


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _answer(vmm: Vmm, method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
    headers: tuple[str, ...] = ()
    try:
        action = parse(method, path, body)
        if _deprecated(action.body):
            headers = ("Deprecation: true",)
            vmm.metrics.count("deprecated_api", "deprecated_http_api_calls")
        result = vmm.handle(action)
    except ApiError as error:
        return error.status, _encode(types.Fault(fault_message=error.message)), headers
    except Exception as error:  # a mistake of ours must cost neither the VM nor the API
        sys.excepthook(*sys.exc_info())
        return 500, _encode(types.Fault(fault_message=f"Internal error: {type(error).__name__}: {error}")), ()
    if isinstance(result, str):
        return 200, result.encode(), (PROMETHEUS,)
    return (204, b"", headers) if result is None else (200, _encode(result), headers)


def _deprecated(body: Any) -> bool:
    # Whether it sets a field that clients should do without, as Firecracker tells them.
    match body:
        case types.Vsock():
            return body.vsock_id not in (None, msgspec.UNSET)
        case types.MachineConfiguration() | types.MachineConfigurationUpdate():
            return body.cpu_template not in (None, msgspec.UNSET)
        case types.MmdsConfig():
            return body.version == "V1"
        case _:
            return False
