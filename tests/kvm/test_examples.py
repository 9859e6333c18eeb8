# SPDX-License-Identifier: Apache-2.0
"""The programs in examples/ that need a /dev/kvm and no Linux. The others: tests/linux, tests/vmm/test_uffd.py."""

from __future__ import annotations

import http.server
import runpy
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "device.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "the guest: guest exit 0"
    assert said[1].startswith("1000 readings; from one to the next ")


def test_the_fuzzer_finds_the_crash(capsys: pytest.CaptureFixture[str]) -> None:
    program = runpy.run_path(str(EXAMPLES / "fuzzer.py"))
    assert program["main"]("1") == 0
    said = capsys.readouterr().out
    assert said.startswith("crash at input ") and "b'BUG!" in said
    assert "; 3 inputs reached something new" in said


def test_the_fuzzer_gives_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = runpy.run_path(str(EXAMPLES / "fuzzer.py"))
    monkeypatch.setattr(program["Fuzzer"].__init__, "__defaults__", (100,))
    assert program["main"]("1") == 1
    assert capsys.readouterr().out == "no crash within 100 inputs\n"


def test_the_memory_search(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "memory_search.py"))["main"]()
    assert capsys.readouterr().out == "0x123456: secret!\n"


def test_a_vm_per_request() -> None:
    program = runpy.run_path(str(EXAMPLES / "vm_per_request.py"))
    handler = program["Handler"]
    handler.log_message = lambda *words: None
    with program["pool"](2) as handler.pool, http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            answers = [urllib.request.urlopen(f"{base}/?{number}").read() for number in (7, 70000, 12)]
            with pytest.raises(urllib.error.HTTPError, match="must be a number") as refused:
                urllib.request.urlopen(f"{base}/?x")
        finally:
            server.shutdown()
            thread.join()
    assert answers == [b"49\n", b"605032704\n", b"144\n"]
    assert refused.value.code == 400
    refused.value.close()
