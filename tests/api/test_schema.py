# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document: valid, whole, and true: schemathesis asks a real process what it says can be asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openapi_spec_validator import validate

from tests.api.oracle import Client
from tools.openapi import document
from vmm.api.actions import ACTIONS, OPENAPI

# Of each operation; 20 take half a minute for all.
EXAMPLES = int(os.environ.get("PYVMM_SCHEMA_EXAMPLES", "20"))
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
# By hypothesis alone: the pytest plug-in would cost every run of every test its three seconds of import.
_FOUND: list[Any] = list(schemathesis.openapi.from_dict(document()).get_all_operations())
OPERATIONS = [found.ok() for found in _FOUND]


class _Proxy(socketserver.BaseRequestHandler):
    # From TCP, which schemathesis speaks, to the socket.
    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(self.server.path)  # type: ignore[attr-defined]

            def pump(source: socket.socket, sink: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    while data := source.recv(65536):
                        sink.sendall(data)
                with contextlib.suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=pump, args=(self.request, other))
            thread.start()
            pump(other, self.request)
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)
            thread.join()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    path: str


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, str]]:
    """A served VM that is never started: the unix socket, and its URL by TCP."""
    with tempfile.TemporaryDirectory() as name:
        path = str(Path(name, "api.sock"))
        command = [sys.executable, "-m", "vmm", "serve", "--api-sock", path]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=name)
        try:
            while not Path(path).exists():
                assert process.poll() is None
            with _Server(("127.0.0.1", 0), _Proxy) as server:
                server.path = path
                threading.Thread(target=server.serve_forever, daemon=True).start()
                yield path, f"http://127.0.0.1:{server.server_address[1]}"
                server.shutdown()
            assert process.poll() is None, "it lives on"
        finally:
            process.kill()
            process.wait()


def test_document_is_valid_and_whole() -> None:
    made = document()
    validate(made)
    assert {(method.upper(), path) for path, item in made["paths"].items() for method in item} == {
        (route.method, route.path) for route in ACTIONS.values() if route.path
    }
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(made)))
    assert used == set(made["components"]["schemas"])


def test_the_file_is_of_these_routes_and_types() -> None:
    how = "python -m tools.openapi >vmm/api/openapi.json"
    assert json.loads(OPENAPI) == json.loads(json.dumps(document())), how


def test_it_is_served(served: tuple[str, str]) -> None:
    answer = Client(served[0]).request("GET", "/openapi.json")
    assert answer.status == 200
    assert answer.json == json.loads(json.dumps(document()))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_what_it_says_is_so(operation: Any, served: tuple[str, str]) -> None:
    checks: list[Any] = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in CHECKS]
    assert len(checks) == len(CHECKS)

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(operation.as_strategy())
    def examples(case: schemathesis.Case[Any]) -> None:
        response = case.call(base_url=served[1], timeout=20)
        case.validate_response(response, checks=checks)

    examples()
