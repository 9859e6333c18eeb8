# SPDX-License-Identifier: Apache-2.0
"""``pyvmm jailer`` as its tests start it: a jail, what is put into it before, and the process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.unix_http import Connection
from tests.waiting import PATIENCE, until

ROOT = Path(__file__).parents[2]
UID = 1234
ID = "vm-1"


class Jailed:
    """A jail below `base`, and one VMM in it.

    ``root`` is its root directory as the host sees it; files are put there by ``put`` before ``start``.
    """

    def __init__(self, base: Path, *, uid: int = UID) -> None:
        self.base = base
        self.uid = uid
        self.program = base / "link" / "firecracker"
        self.program.parent.mkdir(parents=True)
        self.program.symlink_to(ROOT / "vmm/commands/cli.py")
        self.root = base / "firecracker" / ID / "root"
        self.root.mkdir(parents=True)
        self.process: subprocess.Popen[str] | None = None

    def put(self, name: str, data: bytes | Path) -> Path:
        """A file of the jail's user."""
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(data, Path):
            shutil.copy(data, path)
        else:
            path.write_bytes(data)
        for each in (path.parent, path):
            os.chown(each, self.uid, self.uid)
        return path

    def configure(self, **sections: object) -> tuple[str, str]:
        """Write a configuration file; the VMM's arguments that name it."""
        self.put("config.json", json.dumps({name.replace("_", "-"): body for name, body in sections.items()}).encode())
        return "--config-file", "/config.json"

    def command(
        self, *options: str, vmm: tuple[str, ...] = (), recorded: bool = False, jailer: str | None = None
    ) -> list[str]:
        """The command line; of `jailer`, if it is another's."""
        if jailer is not None:
            user = str(self.uid)
            line = [jailer, "--id", ID, "--exec-file", str(self.program), "--uid", user, "--gid", user]
            return [*line, "--chroot-base-dir", str(self.base), *options, "--", *vmm]
        program = [str(ROOT / "tests/jail/recorded.py")] if recorded else [str(ROOT / "vmm/commands/cli.py"), "jailer"]
        return [
            sys.executable, *program, "--id", ID, "--exec-file", str(self.program), f"--uid={self.uid}",
            "--gid", str(self.uid), "--chroot-base-dir", str(self.base), *options, "--", *vmm,
        ]  # fmt: skip

    def start(
        self, *options: str, vmm: tuple[str, ...] = (), recorded: bool = False, command: str | None = None
    ) -> Jailed:
        """Start it."""
        self.process = subprocess.Popen(
            self.command(*options, vmm=vmm, recorded=recorded, jailer=command), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "SECRET": "not for the jail"},
        )  # fmt: skip
        return self

    @property
    def pid(self) -> int:
        """Of the VMM, from its pid file, as soon as it is there."""
        path = self.root / "firecracker.pid"
        return int(until(lambda: path.exists() and path.read_text()))

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request to the API's default socket."""
        sock = self.root / "run/firecracker.socket"
        until(sock.exists)
        connection = Connection(sock)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        until(lambda: self._try(connection))
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        is_json = "json" in response.headers.get("Content-Type", "")
        return response.status, json.loads(text) if text and is_json else text.decode()

    @staticmethod
    def _try(connection: Connection) -> bool:
        try:
            connection.connect()
        except ConnectionRefusedError:
            return False  # bound, and not yet listening
        return True

    def end(self) -> str:
        """Wait for its end, which must be exit status 0; what it said."""
        assert self.process is not None
        said, told = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, (self.process.returncode, said, told)
        return said

    def close(self) -> None:
        """Kill what is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        pid_file = self.root / "firecracker.pid"
        if pid_file.exists() and pid_file.read_text():
            pid = int(pid_file.read_text())
            try:
                if os.readlink(f"/proc/{pid}/root") != "/" or "firecracker" in Path(f"/proc/{pid}/comm").read_text():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # it has ended
