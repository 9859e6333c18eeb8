# SPDX-License-Identifier: Apache-2.0
"""Write the API's own OpenAPI 3.1 document, of the routes and of the types that judge what comes in:
``python -m tools.openapi >vmm/api/openapi.json``. ``vmm.api.actions`` has it.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from vmm.api import API_VERSION, types
from vmm.api.actions import ACTIONS, Route

_FAULTS = {
    400: "The request is refused, and nothing of it was done.",
    413: "The document would be larger than its limit.",
    503: "There are too many connections.",
}


class HttpFault(types.Body, kw_only=True):
    """Why the HTTP request was malformed."""

    error: str


_ROUTES = [route for route in ACTIONS.values() if route.path]
_ID = {"type": "string", "pattern": "^[A-Za-z0-9_]+$"}


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _body(schemas: dict[Any, dict[str, Any]], kind: Any, media: str = "application/json") -> dict[str, Any]:
    return {"content": {media: {"schema": {"type": "string"} if kind is str else schemas.get(kind, {})}}}


def _statuses(route: Route) -> tuple[int, ...]:
    return (400, 413, 503) if route.path == "/mmds" and route.method != "GET" else (400, 503)


def _operation(route: Route, schemas: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    kind = route.body or route.result
    about = getattr(kind, "__doc__", None) if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None
    operation: dict[str, Any] = {
        "operationId": route.action,
        "tags": [route.path.split("/")[1] or "vm"],
        "description": _sentence(about) or "Any JSON.",
    }
    if "{" in route.path:
        name = route.path.partition("{")[2].rstrip("}")
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _ID}]
    if route.body is not None:
        operation["requestBody"] = {"required": True, **_body(schemas, route.body)}
    faults = {}
    for status in _statuses(route):
        kind = types.Fault if status < 500 else HttpFault
        faults[str(status)] = {"description": _FAULTS[status], **_body(schemas, kind)}
    # The answer to what is not a request for this API has another shape.
    faults["400"]["content"]["application/json"]["schema"] = {"anyOf": [schemas[types.Fault], schemas[HttpFault]]}
    if route.result is None:
        good: dict[str, Any] = {"204": {"description": "Done."}}
    else:
        media = "text/plain" if route.result is str else "application/json"
        good = {"200": {"description": "The answer.", **_body(schemas, route.result, media)}}
    return {**operation, "responses": {**good, **faults}}


def document() -> dict[str, Any]:
    """The document, for JSON."""
    kinds = [kind for route in _ROUTES for kind in (route.body, route.result) if isinstance(kind, type)]
    structs = list(dict.fromkeys([*(kind for kind in kinds if issubclass(kind, msgspec.Struct)), types.Fault]))
    structs.append(HttpFault)
    found, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for schema in components.values():  # docstrings, which msgspec takes as they are before 0.23
        schema["description"] = inspect.cleandoc(schema["description"])
    schemas = dict(zip(structs, found, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in _ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pyvmm",
            "version": API_VERSION,
            "description": "Firecracker's API, and /fs, /serial, /metrics/prometheus and this document beside it.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost", "description": "over the unix socket of --api-sock"}],
        "paths": paths,
        "components": {"schemas": components},
    }


if __name__ == "__main__":
    print(msgspec.json.encode(document()).decode())
