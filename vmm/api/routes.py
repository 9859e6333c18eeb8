# SPDX-License-Identifier: Apache-2.0
"""Which request is which action: the table that requests are answered by and the OpenAPI document is made of."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from vmm.api import ApiError, types
from vmm.api.bodies import decode


class VmmAction(Struct, frozen=True):
    """One thing to do.

    :param name: one of ``vmm.api.actions.ACTIONS``; Firecracker's names
    :param body: an object of the type that the action's route names, or None
    """

    name: str
    body: Any = None


class Route(Struct, frozen=True):
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


def _key(method: str, path: str) -> tuple[str, ...]:
    return (method, *("{" if part.startswith("{") else part for part in path.strip("/").split("/")))


_BY_KEY = {_key(route.method, route.path): route for route in ROUTES}


def find(method: str, path: str) -> tuple[Route, str | None]:
    """The route of a request, and the id in its path.

    :raises ApiError: no route matches
    """
    words = path.lstrip("/").removesuffix("/").split("/")
    if route := _BY_KEY.get((method, *words)):
        return route, None
    if len(words) == 2 and words[0] == "vsock" and (route := _BY_KEY.get((method, "vsock"))):
        return route, None  # as Firecracker takes it: there is one socket device, whatever it is called
    if len(words) <= 2 and (route := _BY_KEY.get((method, words[0], "{"))):
        identity = words[1] if len(words) == 2 else ""
        if not identity:
            raise ApiError("The ID cannot be empty.")
        if not all(char.isalnum() or char == "_" for char in identity):
            raise ApiError("API Resource IDs can only contain alphanumeric characters and underscores.")
        return route, identity
    if method == "PUT" and words[0] == "snapshot":
        what = f"Invalid request method and/or path: PUT {path}."
        raise ApiError(what if len(words) > 1 else "Missing snapshot operation type.")
    raise ApiError(f"Invalid request method and/or path: {method} {words[0]}.")


def parse(method: str, path: str, body: bytes) -> VmmAction:
    """The action that a request means.

    :raises ApiError: no action fits the request
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
