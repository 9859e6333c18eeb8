# SPDX-License-Identifier: Apache-2.0
"""Kata Containers from the VMM's side: its two drivers' requests, byte for byte, and what they do between them.

Source: kata-containers 4.x, src/runtime/virtcontainers/fc.go and src/runtime-rs/crates/hypervisor/src/firecracker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.api.oracle import Answer, Client

FIXTURES = Path(__file__).parent / "kata"
ID = "6c1e2f0a9d3b47c58e6f7a8b9c0d1e2f"
TAP = "tap0_kata"
AGENT_PORT = 1024
GO_TIMEOUT, RUST_RETRIES, PAUSE = 10.0, 500, 0.01  # seconds to be running; tries of one request; between two
# /run is the room's; the pod's network namespace has the tap. It stays one process: exec.
ENTER = f'mount --bind "$1" /run && shift && ip link set lo up && ip tuntap add {TAP} mode tap && exec "$@"'
# The same, and Kata's own preparation of a jail's root: a shared mount, so that what is plugged arrives in there. This
# process stays, as the shim does: what it mounts is seen by no other.
SHIM = f"""
set -e
mount --bind "$1" /run
root=$2; shift 2
ip link set lo up
ip tuntap add {TAP} mode tap
mkdir /run/netns
touch /run/netns/pod
mount --bind /proc/self/ns/net /run/netns/pod
mount --bind "$root" "$root"
mount --make-shared "$root"
mount -o remount,bind,nosuid,relatime "$root"
"$@"
exec sleep infinity
"""


class Sandbox:
    """One sandbox, its files in a room that is /run to the VMM; used by ``with``.

    :param program: the VMM; its base name is ``firecracker``
    :param kernel: the guest's
    :param image: the guest's root disk
    """

    runtime: str
    placeholders: tuple[str, ...]  # drives of no length, in order, after the root drive

    def __init__(self, program: str, kernel: str | Path, image: str | Path) -> None:
        self.program = program
        self.room = Path(tempfile.mkdtemp(prefix="pyvmm-kata-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._files = (kernel, image)
        self._client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()
        shutil.rmtree(self.room)

    def path(self, inside: str) -> Path:
        """Where the VMM's `inside` is for us."""
        return self.room / inside.lstrip("/")

    def fixture(self, name: str) -> bytes:
        """A request's bytes."""
        return (FIXTURES / self.runtime / f"{name}.http").read_bytes()

    def disconnect(self) -> None:
        """End the connection to the API."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _lay(self, inside: str, file: str | Path) -> None:
        # Hard to read twice and easy to mount: a copy, as sparse as the file.
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--sparse=always", str(file), str(self.path(inside))], check=True)

    def _launch(self, options: Sequence[str], environment: Mapping[str, str], **streams: Any) -> None:
        command = ["unshare", "-n", "-m", "sh", "-c", ENTER, "sh", str(self.room / "run"), self.program, *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env={**os.environ, **environment}, **streams
        )  # fmt: skip

    def _send(self, socket_path: str, request: bytes) -> Answer | None:
        # On the connection there is, as both clients' pools do; None: there is none to be had, or it broke.
        try:
            if self._client is None:
                with directory_of(self.path(socket_path)) as short:
                    self._client = Client(short)
            self._client.send(request)
            answer = self._client.receive()
        except OSError:
            answer = None
        if answer is None:
            self.disconnect()
        return answer

    @property
    def pid(self) -> int:
        """The VMM's."""
        assert self.process is not None
        return self.process.pid

    def mount(self, image: Path, inside: str) -> None:
        """Bind `image` over the VMM's file `inside`, as Kata does with what it plugs."""
        self._inside("mount", "--bind", str(image), inside)

    def unmount(self, inside: str) -> None:
        """Take it away again."""
        self._inside("umount", "-l", inside)

    def _inside(self, *command: str) -> None:
        subprocess.run(["nsenter", "-m", "-r", "-t", str(self.pid), *command], check=True)

    def threads(self) -> list[str]:
        """Names of the VMM's threads."""
        return [path.read_text().strip() for path in Path(f"/proc/{self.pid}/task").glob("*/comm")]


class Agent:
    """A connection to the guest's program behind the socket; a line is a question, and so is the answer.

    :param path: the socket device's own socket
    :param hello: the line that asks for a port
    :param patience: seconds until there has to be such a program, and for each answer
    :raises TimeoutError: nothing answers
    """

    def __init__(self, path: Path, hello: bytes, patience: float = 90.0) -> None:
        end = time.monotonic() + patience
        self.greeting = b""
        # As both runtimes do: until there is a line with OK in it, and the connection ends while nobody listens.
        while b"OK" not in self.greeting:
            if time.monotonic() > end:
                raise TimeoutError(f"{path}: nobody behind it: {self.greeting!r}")
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(patience)
            try:
                with directory_of(path) as short:
                    self._socket.connect(short)
                self._socket.sendall(hello)
                self._file = self._socket.makefile("rb")
                self.greeting = self._file.readline()
            except (BrokenPipeError, ConnectionResetError):
                pass
            if b"OK" not in self.greeting:
                self._socket.close()
                time.sleep(PAUSE)

    def ask(self, line: str) -> str:
        """Its answer to a line; "" where it hung up."""
        self._socket.sendall(line.encode() + b"\n")
        return self._file.readline().decode().strip()

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def directory_of(path: Path) -> Iterator[str]:
    """A name for `path` short enough for a socket's address."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class Go(Sandbox):
    """The Go runtime: a configuration file, then ``GET /`` until the VM runs."""

    runtime = "go"
    root = f"/run/vc/firecracker/{ID}/root"
    api = f"{root}/run/firecracker.socket"
    uds = f"{root}/kata.hvsock"
    placeholders = tuple(f"drive_{i}" for i in range(8))

    def start(self, environment: Mapping[str, str] | None = None) -> float:
        """From the files to a running VM.

        :returns: seconds until it was told to be running
        :raises AssertionError: the VM took longer than Kata waits
        """
        kernel, image = self._files
        self.path(f"{self.root}/run").mkdir(parents=True, exist_ok=True)
        self._lay(f"{self.root}/vmlinux", kernel)
        self._lay(f"{self.root}/rootfs", image)
        for name in self.placeholders:
            self.path(f"{self.root}/{name}").touch()
        self._lay(f"{self.root}/fcConfig.json", FIXTURES / self.runtime / "fcConfig.json")
        self.fifos = {}
        for name in ("logs", "metrics"):
            os.mkfifo(fifo := self.path(f"{self.root}/{name}.fifo"), 0)  # as Kata's syscall.Mkfifo
            self.fifos[name] = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        with open(self.room / "console", "wb") as console:
            self._launch(self.options(), environment or {}, stdout=console.fileno(), stderr=console.fileno())
        begun = time.monotonic()
        while not self.running():
            late = time.monotonic() - begun > GO_TIMEOUT
            assert not late and self.process is not None and self.process.poll() is None, self.console()
            time.sleep(PAUSE)
        # Nobody else may use the socket; that it is not there yet would be the end of the sandbox.
        os.chmod(self.path(self.uds), 0o640)
        return time.monotonic() - begun

    def options(self) -> list[str]:
        """What the VMM is started with."""
        return ["--api-sock", self.api, "--config-file", f"{self.root}/fcConfig.json"]

    def running(self) -> bool:
        """What one ``GET /`` says."""
        answer = self._send(self.api, self.fixture("describe"))
        if answer is None:
            return False
        # go-openapi finds no way to read another type.
        assert answer.status == 200 and answer.headers["Content-Type"] == "application/json", answer
        return bool(answer.json["state"] == "Running")

    def console(self) -> str:
        """What the VMM printed."""
        return (self.room / "console").read_text(errors="replace")

    def plug(self, number: int, image: Path) -> Answer | None:
        """Put `image` where placeholder `number` was, by the same path."""
        self.mount(image, f"{self.root}/drive_{number}")
        return self._send(self.api, self.fixture(f"plug-drive_{number}"))

    def unplug(self, number: int) -> Answer | None:
        """Give the placeholder back."""
        self.unmount(f"{self.root}/drive_{number}")
        return self._send(self.api, self.fixture(f"plug-drive_{number}"))

    def agent(self) -> Agent:
        """Its agent, by the Go runtime's handshake."""
        return Agent(self.path(self.uds), b"CONNECT %d\n" % AGENT_PORT)

    def stop(self) -> float:
        """SIGTERM, and the seconds until the process was gone."""
        assert self.process is not None
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(15)
        return time.monotonic() - begun

    def heard(self, name: str) -> bytes:
        """What came through a FIFO so far."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.fifos[name], 1 << 16):
                data += piece
        return data


class GoJailed(Go):
    """The Go runtime with a jailer, which is ``jailer`` in the directory of the VMM."""

    runtime = "go-jailed"

    def options(self) -> list[str]:
        """What the jailer is started with."""
        return [
            "--id", ID, "--exec-file", self.program, "--uid", "0", "--gid", "0", "--chroot-base-dir", "/run/vc",
            "--daemonize", "--netns", "/run/netns/pod", "--", "--config-file", "/fcConfig.json",
        ]  # fmt: skip

    def _launch(self, options: Sequence[str], environment: Mapping[str, str], **streams: Any) -> None:
        jailer = str(Path(self.program).with_name("jailer"))
        command = ["unshare", "-n", "-m", "sh", "-c", SHIM, "sh", str(self.room / "run"), self.root, jailer, *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env={**os.environ, **environment}, **streams
        )  # fmt: skip

    @property
    def vmm(self) -> int:
        """The VMM's process id, as its file in the jail has it."""
        return int(self.path(f"{self.root}/firecracker.pid").read_text())

    def threads(self) -> list[str]:
        """Names of the VMM's threads."""
        return [path.read_text().strip() for path in Path(f"/proc/{self.vmm}/task").glob("*/comm")]

    def stop(self) -> float:
        """SIGTERM, and the seconds until the process was gone."""
        vmm, begun = self.vmm, time.monotonic()
        os.kill(vmm, signal.SIGTERM)
        while os.path.exists(f"/proc/{vmm}") and time.monotonic() - begun < 15:
            if Path(f"/proc/{vmm}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break  # nobody here waits for it
            time.sleep(PAUSE)
        return time.monotonic() - begun


class RuntimeRs(Sandbox):
    """The Rust runtime: requests, each tried again until it succeeds."""

    runtime = "runtime-rs"
    root = f"/run/kata/{ID}{ID}"
    api = f"{root}/run/fc.sock"
    uds = f"{root}/kata.hvsock"
    placeholders = tuple(f"drive{i}" for i in range(1, 6))

    def start(self, environment: Mapping[str, str] | None = None) -> dict[str, int]:
        """From nothing to ``InstanceStart``.

        :returns: how often each request was sent
        """
        kernel, image = self._files
        self.path(f"{self.root}/run").mkdir(parents=True, exist_ok=True)
        self.path(f"{self.root}/root").mkdir(exist_ok=True)
        self._lay("/run/kata-static/vmlinux.container", kernel)
        self._lay("/run/kata-static/kata-containers.img", image)
        for name in self.placeholders:
            self.path(f"{self.root}/root/{name}").touch()
        with open(self.room / "console", "ab") as console:
            self._launch(
                ["--api-sock", self.api], environment or {}, stdout=console.fileno(), stderr=subprocess.PIPE
            )  # fmt: skip
        sent = {}
        for file in sorted((FIXTURES / self.runtime).glob("[0-9]*.http")):
            sent[file.stem] = self.insist(file.stem)
        return sent

    def insist(self, name: str) -> int:
        """Send a request until it succeeds; how often.

        :raises AssertionError: it failed as often as Kata tries
        """
        answer = None
        for tried in range(1, RUST_RETRIES + 1):
            answer = self._send(self.api, self.fixture(name))
            if answer is not None and 200 <= answer.status < 300:
                return tried
            if self.process is None or self.process.poll() is not None:
                break
            time.sleep(PAUSE)
        raise AssertionError(f"{name}: {answer}")

    def plug(self, number: int, image: Path) -> int:
        """Put `image` in the place of placeholder `number`, by another path."""
        self._lay(f"{self.root}/root/container{number}", image)
        return self.insist(f"plug-drive{number}")

    def agent(self) -> Agent:
        """Its agent, by the Rust runtime's handshake."""
        return Agent(self.path(self.uds), b"connect %d\n" % AGENT_PORT)

    def ended(self, patience: float) -> bool:
        """Whether stderr came to its end, which is how Kata learns of the VMM's."""
        assert self.process is not None and self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                if not os.read(self.process.stderr.fileno(), 1 << 16):
                    return True
            time.sleep(PAUSE)
        return False
