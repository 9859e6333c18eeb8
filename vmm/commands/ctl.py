# SPDX-License-Identifier: Apache-2.0
"""``pyvmm ctl``: a person's client of the API that runtimes drive; works with Firecracker's socket, too."""

from __future__ import annotations

import argparse
import errno
import http.client
import json
import os
import socket
import sys
from typing import Any

from vmm.config import parse_size
from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

STATUS_REFUSED = 1
PATIENCE = 30.0
_MILLISECONDS = 100  # a limit by the second is a bucket of a tenth of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyvmm ctl``."""
    parser.add_argument("--api-sock", metavar="PATH", required=True, help="the API's unix socket")
    parser.add_argument("--json", action="store_true", help="print the API's answers unchanged")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, do: Callable[[Client, argparse.Namespace], object], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(do=do)
        return command

    add("status", _status, "tell id and state")
    add(
        "config",
        lambda client, args: _document_at(client, "/vm/config", args),
        "the whole configuration, as a file for --config-file",
    )
    add("start", _ask("PUT", "/actions", action_type="InstanceStart"), "start the configured VM")
    add("pause", _ask("PATCH", "/vm", state="Paused"), "hold the VM")
    add("resume", _ask("PATCH", "/vm", state="Resumed"), "let the VM go on")
    snapshot = add("snapshot", _snapshot, "hold the VM, write a snapshot, and let the VM go on")
    snapshot.add_argument("directory", metavar="DIR", help="directory for state and memory; created if missing")
    snapshot.add_argument(
        "--diff", action="store_true", help="only the memory that was written since the last snapshot"
    )
    restore = add("restore", _restore, "load a snapshot into a VM that is not configured")
    restore.add_argument("directory", metavar="DIR")
    restore.add_argument("--paused", action="store_true", help="wait for resume")
    add("ctrl-alt-del", _ask("PUT", "/actions", action_type="SendCtrlAltDel"), "press Ctrl-Alt-Del")
    drive = add("drive", _drive, "change the file or the limits of a disk")
    drive.add_argument("id")
    drive.add_argument("--path", help="the new file, or the same file after its size has changed")
    net = add("net", _net, "change the limits of an interface")
    net.add_argument("id")
    share = add("fs", _fs, "change the limits of a share")
    share.add_argument("tag")
    for each, directions in ((drive, ("",)), (share, ("",)), (net, ("rx-", "tx-"))):
        for direction in directions:
            each.add_argument(f"--{direction}bps", metavar="BYTES", help="bytes a second, with K, M, G; 0: no limit")
            each.add_argument(f"--{direction}iops", metavar="N", help="operations a second; 0: no limit")
    balloon = add("balloon", _balloon, "show or change the size of the balloon")
    balloon.add_argument("mib", nargs="?", type=int, help="the new size in MiB")
    balloon.add_argument("--stats", action="store_true", help="show the guest's memory statistics")
    metrics = add("metrics", _metrics, "show the metrics in Prometheus' text format")
    metrics.add_argument("--flush", action="store_true", help="write a line to the configured file instead")
    mmds = add("mmds", _mmds, "show or change the metadata service's document")
    mmds.add_argument("action", nargs="?", choices=("get", "put", "patch"), default="get")
    mmds.add_argument("document", nargs="?", metavar="JSON", help="for put and patch; - or nothing: stdin")
    request = add("request", _request, "send any request")
    request.add_argument("method", choices=("GET", "PUT", "PATCH"))
    request.add_argument("path")
    request.add_argument("body", nargs="?", metavar="JSON", help="-: stdin")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, patience: float | None) -> None:
        super().__init__("localhost", timeout=patience)
        self._path = path

    def _encode_request(self, request: str) -> bytes:
        return request.encode()  # the library's takes ASCII alone; an id may have any letters

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Refused(Exception):
    """The API's answer is an error; the text is its own."""


class Client:
    """The API of one VM.

    :param path: its unix socket
    :param patience: seconds to wait for an answer; None: however long it takes
    """

    def __init__(self, path: str, patience: float | None = PATIENCE) -> None:
        self.path = path
        self.patience = patience

    def ask(self, method: str, path: str, body: object = None) -> str:
        """The answer's body.

        :raises Refused: the answer is an error
        :raises ConfigError: no request can have this path, or no socket its own
        :raises HostError: no VMM answers
        """
        connection = _Connection(self.path, self.patience)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {} if text is None else {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read().decode(errors="replace")
        except http.client.InvalidURL:
            raise ConfigError("path", path, "must have no spaces or control characters") from None
        except http.client.HTTPException as error:
            raise Refused(f"{path}: the answer is not HTTP: {error}") from None
        except TimeoutError:
            raise HostError(errno.ETIMEDOUT, "ask the API", self.path) from None
        except OSError as error:
            if not error.errno:
                raise ConfigError("--api-sock", self.path, "is too long for a unix socket") from None
            raise HostError(error.errno, "ask the API", self.path) from None
        finally:
            connection.close()
        if response.status >= 300:
            try:
                fault = json.loads(answer)
                answer = fault.get("fault_message") or fault.get("error") or answer
            except (ValueError, AttributeError):
                pass
            raise Refused(f"{method} {path}: {answer.strip() or response.status}")
        return answer


def main(args: argparse.Namespace) -> int:
    """Do what was asked for; 0, or 1: the API refused it."""
    client = Client(args.api_sock)
    try:
        args.do(client, args)
    except Refused as error:
        print(f"pyvmm ctl: {error}", file=sys.stderr)
        return STATUS_REFUSED
    return 0


def _status(client: Client, args: argparse.Namespace) -> None:
    answer = client.ask("GET", "/")
    if args.json:
        print(answer)
    else:
        facts = json.loads(answer)
        print(f"{facts['id']}: {facts['state']} ({facts['app_name']} API {facts['vmm_version']})")


def _document_at(client: Client, path: str, args: argparse.Namespace) -> None:
    answer = client.ask("GET", path)
    print(answer if args.json else json.dumps(json.loads(answer), indent=2))


def _ask(method: str, path: str, **body: str) -> Any:
    return lambda client, args: client.ask(method, path, body)


def _bucket(option: str, text: str | None) -> dict[str, int] | None:
    # What a second may have, as a bucket of a tenth of it, which is filled in a tenth of a second.
    if text is None:
        return None
    value = parse_size(option, text)
    if 0 < value < 10:
        raise ConfigError(option, text, "must be 0, or at least 10")
    return {"size": value // 10, "refill_time": _MILLISECONDS if value else 0}


def _limits(args: argparse.Namespace, direction: str = "") -> dict[str, Any] | None:
    buckets = {}
    for option, name in (("bps", "bandwidth"), ("iops", "ops")):
        bucket = _bucket(f"--{direction}{option}", getattr(args, f"{direction}{option}".replace("-", "_")))
        if bucket is not None:
            buckets[name] = bucket
    return buckets or None


def _change(client: Client, path: str, body: dict[str, Any]) -> None:
    given = {name: value for name, value in body.items() if value is not None}
    if len(given) == 1:  # its id
        raise ConfigError("ctl", path.split("/")[1], "nothing to change; see --help")
    client.ask("PATCH", path, given)


def _drive(client: Client, args: argparse.Namespace) -> None:
    path = None if args.path is None else os.path.abspath(args.path)
    body = {"drive_id": args.id, "path_on_host": path, "rate_limiter": _limits(args)}
    _change(client, f"/drives/{args.id}", body)


def _net(client: Client, args: argparse.Namespace) -> None:
    limits = {f"{way}_rate_limiter": _limits(args, f"{way}-") for way in ("rx", "tx")}
    _change(client, f"/network-interfaces/{args.id}", {"iface_id": args.id, **limits})


def _fs(client: Client, args: argparse.Namespace) -> None:
    _change(client, f"/fs/{args.tag}", {"tag": args.tag, "rate_limiter": _limits(args)})


def _balloon(client: Client, args: argparse.Namespace) -> None:
    if args.mib is not None:
        client.ask("PATCH", "/balloon", {"amount_mib": args.mib})
        return
    answer = client.ask("GET", "/balloon/statistics" if args.stats else "/balloon")
    if args.json:
        print(answer)
        return
    facts = json.loads(answer)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {json.dumps(value)}")


def _metrics(client: Client, args: argparse.Namespace) -> None:
    if args.flush:
        client.ask("PUT", "/actions", {"action_type": "FlushMetrics"})
    else:
        print(client.ask("GET", "/metrics/prometheus"), end="")


def _document(text: str | None) -> object:
    try:
        return json.loads(sys.stdin.read() if text in (None, "-") else text or "")
    except (ValueError, RecursionError) as error:
        raise ConfigError("JSON", text or "", f"is not valid JSON: {error}") from None


def _mmds(client: Client, args: argparse.Namespace) -> None:
    if args.action == "get":
        _document_at(client, "/mmds", args)
    else:
        client.ask(args.action.upper(), "/mmds", _document(args.document))


def _request(client: Client, args: argparse.Namespace) -> None:
    body = None if args.body is None else _document(args.body)
    answer = client.ask(args.method, args.path, body)
    print(answer, end="\n" if answer else "")


def _snapshot(client: Client, args: argparse.Namespace) -> None:
    # The VMM writes the files: a directory that it finds, too, by a path that does not hang on where we are.
    directory = os.path.abspath(args.directory)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    running = json.loads(client.ask("GET", "/"))["state"] == "Running"
    if running:
        client.ask("PATCH", "/vm", {"state": "Paused"})
    client.patience = None  # all of the guest's memory goes to the disk
    try:
        body = _files(directory) | {"snapshot_type": "Diff" if args.diff else "Full"}
        client.ask("PUT", "/snapshot/create", body)
    finally:
        if running:
            client.ask("PATCH", "/vm", {"state": "Resumed"})


def _restore(client: Client, args: argparse.Namespace) -> None:
    files = _files(os.path.abspath(args.directory))
    backend = {"backend_type": "File", "backend_path": files["mem_file_path"]}
    body = {"snapshot_path": files["snapshot_path"], "mem_backend": backend, "resume_vm": not args.paused}
    client.ask("PUT", "/snapshot/load", body)


def _files(directory: str) -> dict[str, str]:
    # As pyvmm's own images have them: `pyvmm run --restore DIR` takes them, too.
    return {"snapshot_path": os.path.join(directory, "state"), "mem_file_path": os.path.join(directory, "memory")}
