# SPDX-License-Identifier: Apache-2.0
"""A VM that the program `pyvmm` serves behind filters: what it imports no sooner than it is asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.unix_http import Connection
from tests.waiting import PATIENCE
from vmm.api.actions import Vmm
from vmm.api.answer import answer
from vmm.testing import tiny_elf

PYVMM = Path(sys.executable).with_name("pyvmm")


def test_a_running_vm_answers_what_needs_more_of_the_library(tmp_path: Path) -> None:
    from tools.openapi import document

    kernel, path = tmp_path / "kernel", tmp_path / "s"
    kernel.write_bytes(tiny_elf(b"\xf4\xeb\xfd"))  # hlt, for ever
    ready, write = os.pipe()
    process = subprocess.Popen([PYVMM, "serve", "--api-sock", path, "--log-path", f"/dev/fd/{write}"], pass_fds=[write])
    os.close(write)

    def ask(method: str, url: str, body: object = None) -> tuple[int, bytes]:
        with contextlib.closing(Connection(path)) as client:
            client.request(method, url, None if body is None else json.dumps(body))
            answer = client.getresponse()
            return answer.status, answer.read()

    try:
        os.read(ready, 1)  # the first line of its log comes after its socket
        assert ask("PUT", "/boot-source", {"kernel_image_path": str(kernel)})[0] == 204
        assert ask("PUT", "/actions", {"action_type": "InstanceStart"})[0] == 204
        status, text = ask("PATCH", "/vm", {"state": "Sleeping"})
        assert (status, b"must be one of Paused, Resumed" in text) == (400, True), text
        status, text = ask("PATCH", "/balloon", {"amount": 1})
        assert (status, b"allowed: amount_mib" in text) == (400, True), text
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        client.sendall("GET /\u00fc HTTP/1.1\r\n\r\nnonsense\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 400")
        client.close()
        status, text = ask("GET", "/openapi.json")
        assert (status, json.loads(text)) == (200, json.loads(json.dumps(document())))
        assert ask("GET", "/")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        os.close(ready)
        process.kill()
        process.wait()


def test_kvm_prepares_one_vm_for_a_machine_that_a_file_configures(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(tiny_elf(b"\xb0\xfe\xe6\x64\xf4"))  # mov al, 0xfe; out 0x64, al: a reset
    (tmp_path / "vm.json").write_text('{"boot-source": {"kernel_image_path": "kernel"}}')
    code = """
import os
from vmm.commands import cli
from vmm.kvm import vm
made, prepare = [], vm.prepare
vm.prepare = lambda: (made.append(prepare()), made[-1])[1]
print(cli.main(["serve", "--no-api", "--config-file", "vm.json"]), len(made), flush=True)
os._exit(0)  # as cli.entry
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("0 1\n", "")


def test_an_interface_of_the_api_has_a_policy(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(tiny_elf(b"\xf4\xeb\xfd"))
    rules = {"allow": ["pypi.org:443", "10.1.0.0/16"], "deny": ["10.1.9.0/24"]}
    with contextlib.closing(Vmm()) as vmm:

        def put(url: str, **body: object) -> tuple[int, bytes]:
            status, text, _ = answer(vmm, "PUT", url, json.dumps(body).encode())
            return status, text

        status, text = put("/network-interfaces/n", iface_id="n", mode="auto", policy={"allow": ["https://pypi.org"]})
        assert (status, b"allow port //pypi.org: must be a number" in text) == (400, True), text
        assert put("/network-interfaces/n", iface_id="n", mode="auto", policy=rules)[0] == 204
        assert json.loads(answer(vmm, "GET", "/vm/config", b"")[1])["network-interfaces"][0]["policy"] == rules
        assert put("/boot-source", kernel_image_path=str(kernel))[0] == 204
        assert put("/actions", action_type="InstanceStart") == (204, b"")
        assert vmm.machine is not None
        assert vmm.machine.nets["n"].stats["policy_dropped"] == 0
