# SPDX-License-Identifier: Apache-2.0
"""Which request asks for which action."""

from __future__ import annotations

from typing import Any

from vmm.api import ApiError, types
from vmm.api.actions import ACTIONS, Route
from vmm.api.bodies import decode


def _key(method: str, path: str) -> tuple[str, ...]:
    return (method, *("{" if part.startswith("{") else part for part in path.strip("/").split("/")))


_BY_KEY = {_key(route.method, route.path): route for route in ACTIONS.values() if route.path}


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


def parse(method: str, path: str, body: bytes) -> tuple[str, Any]:
    """The name of the action that a request means, and its body.

    :raises ApiError: no action fits the request
    """
    if method == "GET" and body:
        raise ApiError("GET request cannot have a body.")
    if method != "GET" and not body:
        raise ApiError(f"Empty {method} request.")
    route, identity = find(method, path)
    if route.body is None:
        return route.action, None
    value = decode(route.body, body)
    if identity is not None:
        name = route.path.partition("{")[2].rstrip("}")
        found = getattr(value, name)
        if found != identity:
            raise ApiError(f"The id from the path [{identity}] does not match the id from the body [{found}]!")
    if isinstance(value, types.MachineConfigurationUpdate) and value == types.MachineConfigurationUpdate():
        raise ApiError("Empty PATCH request.")
    return route.action, value
