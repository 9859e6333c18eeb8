# SPDX-License-Identifier: Apache-2.0
"""A mounted share in the API's snapshots: ``pyvmm serve``, with its filters, saves it and goes on with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.api.oracle import Client
from tests.linux.kernels import kernel
from tests.linux.tools_guest import CMDLINE, tools_image
from tests.waiting import until

pytestmark = pytest.mark.timeout(900)  # the first one may build r3


class Served:
    """A ``pyvmm serve``, its API, and its guest's console."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self._said = directory / "said"
        self._process = process
        until(lambda: (directory / "api").exists())
        self._client = Client(directory / "api")

    def put(self, path: str, *, method: str = "PUT", **body: object) -> None:
        answer = self._client.request(method, path, json.dumps(body).encode())
        assert answer.status == 204, answer.body

    def ask(self, line: str) -> str:
        """What the guest's shell says of a line."""
        assert self._process.stdin is not None
        before = len(self._said.read_bytes())
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        until(lambda: b"\n@done " in self._said.read_bytes()[before:] or self._process.poll() is not None)
        assert self._process.poll() is None, self._said.read_text(errors="replace")
        return self._said.read_bytes()[before:].decode().partition("\n@done ")[0].strip()

    def wait_ready(self) -> None:
        until(lambda: b"@ready" in self._said.read_bytes())


@contextmanager
def serve(directory: Path) -> Iterator[Served]:
    directory.mkdir()
    command = [sys.executable, "-m", "vmm", "serve", "--api-sock", str(directory / "api")]
    with (directory / "said").open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT)
    with process:
        try:
            yield Served(directory, process)
        finally:
            process.kill()


def test_open_files_go_on_in_another_process(native: None, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share/file").write_text("the host's\n")
    snapshot, memory = str(tmp_path / "snapshot"), str(tmp_path / "memory")
    image = tools_image(kernel())
    with serve(tmp_path / "one") as one:
        one.put("/machine-config", vcpu_count=1, mem_size_mib=256)
        one.put("/boot-source", kernel_image_path=str(image.kernel), initrd_path=str(image.initrd), boot_args=CMDLINE)
        one.put(
            "/drives/r", drive_id="r", path_on_host=str(image.rootfs), is_root_device=False, is_read_only=True
        )  # fmt: skip
        one.put("/fs/share", tag="share", shared_dir=str(tmp_path / "share"))
        one.put("/actions", action_type="InstanceStart")
        one.wait_ready()
        assert one.ask("mount -t virtiofs share /mnt/a && cd /mnt/a && exec 5<file 6>>log && cat file") == "the host's"
        one.put("/vm", method="PATCH", state="Paused")
        one.put("/snapshot/create", snapshot_path=snapshot, mem_file_path=memory)
        one.put("/vm", method="PATCH", state="Resumed")
        assert one.ask("cat <&5; echo first >&6; pwd") == "the host's\n/mnt/a"
    with serve(tmp_path / "two") as two:
        backend = {"backend_type": "File", "backend_path": memory}
        two.put("/snapshot/load", snapshot_path=snapshot, mem_backend=backend, resume_vm=True)
        assert two.ask("cat <&5; echo second >&6; cat log; pwd") == "the host's\nfirst\nsecond\n/mnt/a"
