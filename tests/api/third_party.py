# SPDX-License-Identifier: Apache-2.0
"""Firecracker clients that others wrote, unmodified, with whatever is named ``firecracker`` in Firecracker's place.

Each runs in namespaces of its own, where there is what it wants of its host: /usr/local/bin/firecracker, a directory
under /var/lib, a default route, a Docker daemon that tells its version, and a web page that tells the host's address.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benches.peers.firecracker import Missing, pip
from tests.api.sandbox import Agent
from vmm.images import apt, cache_root

# From PyPI; pip brings what they need, but for the last one's, which has a hundred packages for what is not used here.
WHEELS = {
    "firecracker-python": ("firecracker-python==0.0.5", "smolvm==0.0.36"),
    "hysn": ("hysn-firecracker-python==1.0.7",),
    "bunkervm": ("--no-deps", "bunkervm==0.14.0", "bandsox==3.5"),
}
_HOMES = {"smolvm": "firecracker-python", "bandsox": "bunkervm"}
ADDRESS = "198.51.100.7"
ROOT = Path(__file__).parents[2]
# $1 is the room; the rest the command. Mounts and interfaces of its own; processes stay.
ENTER = """
set -e
room=$1; shift
mount --bind "$room/lib" /var/lib
mount --bind "$room/bin" /usr/local/bin
mount --bind "$room/hosts" /etc/hosts
ip link set lo up
ip tuntap add eth0 mode tap
ip addr add 192.0.2.2/24 dev eth0
ip link set eth0 up
ip route add default via 192.0.2.1 dev eth0
exec "$@"
"""


class ClientFailed(Exception):
    """A client did not get to its end; with what it said."""


def installed(client: str = "firecracker-python") -> Path:
    """The directory with the client, fetched the first time; nothing of it is in our own environment.

    :raises Missing: the client cannot be fetched
    """
    return fetched(*WHEELS[_HOMES.get(client, client)])


def fetched(*wheels: str) -> Path:
    """A directory with those of PyPI, for PYTHONPATH; fetched the first time.

    :raises Missing: they cannot be fetched
    """
    key = hashlib.sha256(repr((wheels, sys.version_info[:2])).encode()).hexdigest()[:12]
    place = Path(cache_root(), "clients", key)
    if not place.exists():
        new = place.with_suffix(".new")
        pip("clients", "install", "--upgrade", "--target", str(new), *wheels)
        new.rename(place)
    return place


def run(
    client: str, program: str, kernel: Path, rootfs: Path, questions: Sequence[str] = ("0",), patience: float = 60
) -> dict[str, Any]:
    """Have a client boot a guest.

    :param client: one of ``CLIENTS``
    :param program: what stands for /usr/local/bin/firecracker
    :param questions: to the program behind the guest's vsock port 1024
    :raises Missing: something cannot be fetched
    :raises ClientFailed: the client failed or took too long
    """
    with tempfile.TemporaryDirectory(prefix="pyvmm-client-") as directory:
        command = [*_command(client, program, kernel, rootfs, Path(directory)), *questions]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
        except subprocess.TimeoutExpired as late:
            raise ClientFailed(f"{client}: no end in {patience} s: {(late.stderr or b'')[-3000:]!r}") from None
    if done.returncode:
        raise ClientFailed(f"{client}: status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def nftables() -> Path:
    """Where Debian's module of that name is.

    :raises PullError: the package cannot be fetched
    """
    return apt.package("python3-nftables").tree / "usr/lib/python3/dist-packages"


def _command(client: str, program: str, kernel: Path, rootfs: Path, room: Path) -> list[str]:
    for name in ("lib/firecracker", "bin"):
        (room / name).mkdir(parents=True)
    (room / "bin" / "firecracker").symlink_to(program)
    (room / "hosts").write_text("127.0.0.1 localhost ifconfig.me ipinfo.io api.ipify.org\n")
    _make_certificate(room)
    # Debian's own binding of nft, which firecracker-python needs and PyPI has not.
    clients = [client, "hysn"] if client == "bandsox" else [client]  # which wants hysn's requests, too
    places = ":".join(map(str, (*map(installed, clients), nftables(), ROOT)))
    environment = [
        f"PYTHONPATH={places}", f"PATH=/usr/local/bin:{os.environ['PATH']}", f"HOME={room}",
        f"DOCKER_HOST=unix://{room}/docker.sock", f"REQUESTS_CA_BUNDLE={room}/page.pem", f"ROOM={room}",
    ]  # fmt: skip
    return [
        "unshare", "-n", "-m", "sh", "-c", ENTER, "sh", str(room), "env", "-C", str(room), *environment,
        sys.executable, "-m", "tests.api.third_party", client, str(kernel), str(rootfs),
    ]  # fmt: skip


def _make_certificate(room: Path) -> None:
    if shutil.which("openssl") is None:
        raise Missing("openssl: apt-get install openssl")
    names = "subjectAltName=DNS:ifconfig.me,DNS:ipinfo.io,DNS:api.ipify.org"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "9",
         "-subj", "/CN=page", "-addext", names, "-keyout", room / "page.key", "-out", room / "page.pem"],
        check=True, capture_output=True,
    )  # fmt: skip


# What is around the client


class _Answers(http.server.BaseHTTPRequestHandler):
    body = b""
    kind = "text/plain"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


class _Docker(_Answers):
    body = json.dumps({"Version": "27.0", "ApiVersion": "1.44", "MinAPIVersion": "1.24"}).encode()
    kind = "application/json"

    def address_string(self) -> str:
        return "docker"


class _Page(_Answers):
    body = ADDRESS.encode()


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def _surround(room: Path) -> None:
    page = http.server.ThreadingHTTPServer(("127.0.0.1", 443), _Page)
    page.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(room / "page.pem", room / "page.key")
    page.socket = context.wrap_socket(page.socket, server_side=True)
    for server in (page, _UnixServer(str(room / "docker.sock"), _Docker)):
        threading.Thread(target=server.serve_forever, daemon=True).start()


# The clients


def _agent(uds: str | Path) -> Agent:
    return Agent(Path(uds), b"CONNECT 1024\n")


def firecracker_python(kernel: str, rootfs: str, questions: list[str]) -> dict[str, Any]:
    """PyPI's firecracker-python: its MicroVM, from create() to delete()."""
    from firecracker import MicroVM  # type: ignore[import-not-found]

    vm = MicroVM(
        name="third_party", kernel_file=kernel, base_rootfs=rootfs, vcpu=1, memory=128, vsock_enabled=True,
        mmds_enabled=True, user_data="said by the host",
    )  # fmt: skip
    found: dict[str, Any] = {"created": vm.create()}
    try:
        with _agent(vm._vsock_uds_path) as agent:
            found["agent"] = [agent.ask(question) for question in questions]
            found["config"] = vm.config()
            found["status"] = vm.status()
            found["listed"] = [(each["id"] == vm._microvm_id, each["state"]) for each in MicroVM.list()]
            found["paused"] = (vm.pause(), vm._vmm.get_vmm_state(vm._microvm_id))
            found["resumed"] = (vm.resume(), vm._vmm.get_vmm_state(vm._microvm_id))
            found["agent_again"] = agent.ask(questions[0])
    finally:
        found["deleted"] = vm.delete()
    found["left"] = os.listdir("/var/lib/firecracker")
    return found


def smolvm(kernel: str, rootfs: str, questions: list[str]) -> dict[str, Any]:
    """PyPI's smolvm: its client for Firecracker's API, whose HTTP is Rust."""
    from smolvm.api import FirecrackerClient  # type: ignore[import-not-found]
    from smolvm.exceptions import FirecrackerAPIError  # type: ignore[import-not-found]

    room = Path(os.environ["ROOM"])
    subprocess.run(["ip", "tuntap", "add", "tap0", "mode", "tap"], check=True)
    process = subprocess.Popen(["firecracker", "--api-sock", "s.sock"], cwd=room, stdin=subprocess.DEVNULL)
    found: dict[str, Any] = {}
    try:
        client = FirecrackerClient(room / "s.sock")
        client.wait_for_socket(60)
        found["before"] = client.get_instance_info()["state"]
        client.set_boot_source(Path(kernel))
        client.set_machine_config(1, 128)
        client.add_drive("rootfs", Path(rootfs))
        client.add_network_interface("eth0", "tap0", "06:00:ac:10:00:02", rate_limit_mbps=100)
        client.add_vsock_device(3, str(room / "s.vsock"))
        client.start_instance()
        with _agent(room / "s.vsock") as agent:
            found["agent"] = [agent.ask(question) for question in questions]
            client.pause_vm()
            found["paused"] = client.get_instance_info()["state"]
            client.resume_vm()
            found["after"] = client.get_instance_info()["state"]
            found["agent_again"] = agent.ask(questions[0])
        try:
            client.set_machine_config(2, 256)
        except FirecrackerAPIError as error:
            found["refused"] = str(error)
    finally:
        process.terminate()
        found["exit"] = process.wait(15)
    return found


def hysn(kernel: str, rootfs: str, questions: list[str]) -> dict[str, Any]:
    """PyPI's hysn-firecracker-python: a MicroVM, its snapshot, and another MicroVM of that."""
    from firecracker import MicroVM

    room = Path(os.environ["ROOM"])
    image = Path(shutil.copy(rootfs, room / "rootfs.img"))
    options = {"kernel_file": kernel, "base_rootfs": str(image), "vcpu": 1, "memory": 128, "vsock_enabled": True}
    vm = MicroVM(name="one", **options)
    found: dict[str, Any] = {"created": vm.create()}
    with _agent(vm._vsock_uds_path) as agent:
        found["agent"] = [agent.ask(question) for question in questions]
    vm.snapshot(action="create")
    found["after"] = vm._vmm.get_vmm_state(vm._microvm_id)
    with _agent(vm._vsock_uds_path) as agent:
        found["agent_after"] = agent.ask(questions[0])
    for path in (vm._mem_file_path, vm._snapshot_path):
        shutil.copy(path, room)
    uds = Path(vm._vsock_uds_path)
    found["deleted"] = vm.delete()
    # The first disk went with its machine. The client would put it there itself, but its way of doing so fails with
    # Firecracker, too (it calls methods of its own that are not there).
    disk = uds.parent / "rootfs" / image.name
    disk.parent.mkdir(parents=True)
    shutil.copy(image, disk)
    other = MicroVM(name="two", **options)
    found["restored"] = other.create(
        snapshot=True, memory_path=str(room / "memory"), snapshot_path=str(room / "snapshot"), rootfs_path=str(image)
    )
    try:
        with _agent(uds) as agent:
            found["agent_restored"] = agent.ask(questions[0])
        found["state"] = other._vmm.get_vmm_state(other._microvm_id)
    finally:
        found["deleted_too"] = other.delete()
    return found


def bunkervm(kernel: str, rootfs: str, questions: list[str]) -> dict[str, Any]:
    """PyPI's bunkervm: its VMManager, create_snapshot() and start_from_snapshot()."""
    from bunkervm.config import BunkerVMConfig  # type: ignore[import-not-found]
    from bunkervm.vm_manager import VMManager  # type: ignore[import-not-found]

    room = os.environ["ROOM"]
    config = BunkerVMConfig(
        vcpu_count=1, mem_size_mib=128, firecracker_bin="/usr/local/bin/firecracker", kernel_path=kernel,
        rootfs_path=rootfs, rootfs_work_path=f"{room}/work.ext4", socket_path=f"{room}/s.sock",
        vsock_uds_path=f"{room}/v.sock",
    )  # fmt: skip
    vm = VMManager(config, network=False)
    vm.start()
    found: dict[str, Any] = {}
    try:
        with _agent(f"{room}/v.sock") as agent:
            found["agent"] = [agent.ask(question) for question in questions]
        found["snapshot"] = vm.create_snapshot("first").name
        with _agent(f"{room}/v.sock") as agent:
            found["agent_after"] = agent.ask(questions[0])
        vm.stop()
        vm.start_from_snapshot("first")
        with _agent(f"{room}/v.sock") as agent:
            found["agent_restored"] = agent.ask(questions[0])
        found["running"] = vm.is_running()
    finally:
        vm.stop()
    return found


def bandsox(kernel: str, rootfs: str, questions: list[str]) -> dict[str, Any]:
    """PyPI's bandsox: its client for Firecracker's API, by which its sandboxes are saved and restored."""
    from bandsox.firecracker import FirecrackerClient  # type: ignore[import-not-found]

    room = Path(os.environ["ROOM"])
    found: dict[str, Any] = {}

    def start(name: str) -> tuple[subprocess.Popen[bytes], Any]:
        process = subprocess.Popen(["firecracker", "--api-sock", name], cwd=room, stdin=subprocess.DEVNULL)
        client = FirecrackerClient(str(room / name))
        assert client.wait_for_socket()
        return process, client

    process, client = start("one.sock")
    try:
        client.put_boot_source(kernel, "reboot=k panic=1")
        client.put_drives("rootfs", rootfs, is_root_device=True, rate_limit_iops=1000)
        client.put_machine_config(1, 128)
        client.put_entropy()
        client.put_vsock("vsock0", 3, str(room / "v.sock"))
        client.instance_start()
        with _agent(room / "v.sock") as agent:
            found["agent"] = [agent.ask(question) for question in questions]
        client.pause_vm()
        client.create_snapshot(str(room / "snap"), str(room / "mem"))
        process.kill()
        process.wait()
        (room / "v.sock").unlink()
        process, client = start("two.sock")
        client.load_snapshot(str(room / "snap"), str(room / "mem"))
        client.resume_vm()
        with _agent(room / "v.sock") as agent:
            found["agent_restored"] = agent.ask(questions[0])
    finally:
        process.kill()
        process.wait()
    return found


CLIENTS: dict[str, Callable[[str, str, list[str]], dict[str, Any]]] = {
    "firecracker-python": firecracker_python,
    "smolvm": smolvm,
    "hysn": hysn,
    "bunkervm": bunkervm,
    "bandsox": bandsox,
}


def main(client: str, kernel: str, rootfs: str, *questions: str) -> int:
    """Run one client."""
    _surround(Path(os.environ["ROOM"]))
    print(json.dumps(CLIENTS[client](kernel, rootfs, list(questions))), flush=True)
    # What clients leave running must not keep us.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
