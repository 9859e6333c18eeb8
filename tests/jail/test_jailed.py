# SPDX-License-Identifier: Apache-2.0
"""Guests with each device in a jail, behind seccomp filters, started by the command that a runtime types."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benches.peers.firecracker import jailer
from tests.api.oracle import firecracker
from tests.jail.jailed import UID, Jailed
from tests.kvm.guests import write_guest
from tests.kvm.ring3 import Words, kernel
from tests.waiting import PATIENCE, until
from vmm.errors import ConfigError
from vmm.kvm.vm import Kvm

DISK = 1 << 20
MIB = 1 << 20
IDLE = "1: hlt; jmp 1b"


@pytest.fixture(autouse=True)
def _layers() -> None:
    if os.geteuid():
        pytest.skip("LAYER MISSING: jail: needs root")
    try:
        Kvm().close()
    except ConfigError as error:
        pytest.skip(f"LAYER MISSING: kvm: {error}")


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jailed]:
    jailed = Jailed(tmp_path)
    yield jailed
    jailed.close()


def guest(jail: Jailed, driver: str | None, words: str = "", **sections: Any) -> tuple[str, str]:
    """Put a driver and a configuration with it into the jail; None: a guest that does nothing for ever."""
    jail.put("kernel", Path(kernel(driver)) if driver else Path(write_guest(jail.base, IDLE)))
    return jail.configure(
        boot_source={"kernel_image_path": "/kernel", "boot_args": words},
        machine_config={"vcpu_count": 1, "mem_size_mib": 32},
        **{"drives": [], **sections},
    )


def disk(engine: str = "Sync") -> dict[str, Any]:
    return {
        "drive_id": "d", "path_on_host": "/disk", "is_root_device": False, "is_read_only": False, "io_engine": engine,
    }  # fmt: skip


def everything(jail: Jailed) -> dict[str, Any]:
    """Every device that needs no other program."""
    jail.put("disk", bytes(DISK))
    jail.put("share/input", random.Random(1).randbytes(3 * MIB))
    return {
        "drives": [disk("Async")],
        "vsock": {"guest_cid": 52, "uds_path": "/v"},
        "entropy": {},
        "balloon": {"amount_mib": 1, "deflate_on_oom": True, "stats_polling_interval_s": 1},
        "fs": [{"tag": "tag", "shared_dir": "/share"}],
    }


def written(path: Path) -> bool:
    data = path.read_bytes()
    words = ((page * 512 + 1) * 0x9E3779B97F4A7C15 % (1 << 64) for page in range(DISK // 4096))
    return all(data[page * 4096 :][:8] == word.to_bytes(8, "little") for page, word in enumerate(words))


@pytest.mark.parametrize("engine", ["Sync", "Async"])
def test_a_disk_is_written_in_a_jail(jail: Jailed, engine: str) -> None:
    image = jail.put("disk", bytes(DISK))
    vmm = guest(jail, "blk", "test=0", drives=[disk(engine)])
    assert Words(jail.start(vmm=vmm).end())["id"] == ["d"]
    assert written(image)


@pytest.mark.parametrize("uid", [0, UID])
@pytest.mark.parametrize("cache", ["auto", "always", "none"])
def test_a_share_is_used_in_a_jail(tmp_path: Path, uid: int, cache: str) -> None:
    jail = Jailed(tmp_path, uid=uid)
    try:
        data = jail.put("share/input", random.Random(1).randbytes(3 * MIB + 12345)).read_bytes()
        vmm = guest(jail, "fs", fs=[{"tag": "tag", "shared_dir": "/share", "cache_policy": cache}])
        assert Words(jail.start(vmm=vmm).end())["written"] == [str(len(data))]
    finally:
        jail.close()
    output = jail.root / "share/output"
    assert output.read_bytes() == bytes(byte ^ 0xFF for byte in data)
    assert output.stat().st_uid == uid


def test_a_share_has_its_window_in_a_jail(jail: Jailed) -> None:
    size = len(jail.put("share/input", random.Random(1).randbytes(3 * MIB)).read_bytes())
    vmm = guest(jail, "fs", fs=[{"tag": "tag", "shared_dir": "/share", "cache_size": 4 * MIB}])
    words = Words(jail.start(vmm=vmm).end())
    assert words["size"] == [str(size)]
    assert "dax" in words


@pytest.mark.parametrize("test", [0, 1])
def test_random_numbers_and_a_balloon_in_a_jail(jail: Jailed, test: int) -> None:
    vmm = guest(jail, "small", f"test={test}", entropy={}, balloon={"amount_mib": 1, "deflate_on_oom": True,
                                                                      "stats_polling_interval_s": 1,
                                                                      "free_page_reporting": True})  # fmt: skip
    words = Words(jail.start(vmm=vmm).end())
    assert int(words["bytes" if test == 0 else "wanted"][0]) > 0


def test_a_guest_connects_out_of_a_jail(jail: Jailed) -> None:
    vmm = guest(jail, "vsock", "test=0 connections=4", vsock={"guest_cid": 52, "uds_path": "/v"})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(jail.root / "v_7003"))
        os.chown(jail.root / "v_7003", UID, UID)
        listener.listen(8)
        listener.settimeout(PATIENCE)

        def echo(connection: socket.socket) -> None:
            with connection, contextlib.suppress(ConnectionError):
                while data := connection.recv(65536):
                    connection.sendall(data)

        def serve() -> None:
            for _ in range(4):
                threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        assert Words(jail.start(vmm=vmm).end())["bytes"] == [str(4 * MIB)]


def test_a_host_connects_into_a_jail(jail: Jailed) -> None:
    vmm = guest(jail, "vsock", "test=1 connections=1", vsock={"guest_cid": 52, "uds_path": "/v"})
    jail.start(vmm=vmm)
    assert jail.process is not None and jail.process.stdout is not None
    jail.process.stdout.readline()  # the driver is up
    data = random.Random(2).randbytes(MIB)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(jail.root / "v"))
        sock.sendall(b"CONNECT 6000\n")
        assert sock.recv(3) == b"OK "
        while sock.recv(1) != b"\n":
            pass

        def feed() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        threading.Thread(target=feed, daemon=True).start()
        back = b""
        while part := sock.recv(65536):
            back += part
    assert back == data
    jail.end()


def test_pings_are_answered_out_of_a_jail_in_a_network_namespace(jail: Jailed) -> None:
    name = f"pyvmm-jail-{os.getpid()}"
    inside = ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for words in ("tuntap add tap0 mode tap", "addr add 10.99.0.1/24 dev tap0", "link set tap0 up"):
            subprocess.run(["ip", "-n", name, *words.split()], check=True)
        network = {"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:02"}
        vmm = guest(jail, "net", "test=0", network_interfaces=[network])
        jail.start("--netns", f"/run/netns/{name}", vmm=vmm)
        script = Path(__file__).with_name("pinger.py")
        pinger = subprocess.run([*inside, "python3", str(script), "10.99.0.2", "500"], timeout=PATIENCE)
        assert pinger.returncode == 0
        assert Words(jail.end())["echoes"] == ["500"]
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_nothing_is_imported_in_a_jail(jail: Jailed) -> None:
    vmm = guest(jail, "blk", "test=0", **everything(jail))
    assert jail.start(vmm=vmm, recorded=True).end().splitlines()[-1] == "imports tried in the jail:"


def test_nothing_is_imported_in_a_jail_that_is_driven_by_its_socket(jail: Jailed) -> None:
    jail.put("other", bytes(2 * DISK))
    jail.put("log", b"")
    jail.put("metrics", b"")
    devices = everything(jail)
    jail.put("kernel", Path(write_guest(jail.base, IDLE)))
    jail.start(recorded=True)
    requests: list[tuple[int, str, str, Any]] = [
        (200, "GET", "/", None),
        (200, "GET", "/version", None),
        (400, "PUT", "/boot-source", b"{"),
        (400, "PUT", "/nothing", {}),
        (204, "PUT", "/logger", {"log_path": "/log", "level": "Debug", "show_level": True, "show_log_origin": True}),
        (204, "PUT", "/metrics", {"metrics_path": "/metrics"}),
        (204, "PUT", "/boot-source", {"kernel_image_path": "/kernel", "boot_args": ""}),
        (204, "PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 32}),
        (204, "PUT", "/cpu-config", {}),
        (204, "PUT", "/drives/d", devices["drives"][0]),
        (204, "PUT", "/vsock", devices["vsock"]),
        (204, "PUT", "/balloon", devices["balloon"]),
        (204, "PUT", "/entropy", {}),
        (204, "PUT", "/fs/tag", devices["fs"][0]),
        (204, "PUT", "/mmds", {"a": "b"}),
        (200, "GET", "/vm/config", None),
        (204, "PUT", "/actions", {"action_type": "InstanceStart"}),
        (204, "PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "/other"}),
        (204, "PATCH", "/drives/d", {"drive_id": "d", "rate_limiter": {"ops": {"size": 10, "refill_time": 100}}}),
        (400, "PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "/none"}),
        (400, "PATCH", "/vm", {"state": "Unknown"}),
        (204, "PATCH", "/balloon", {"amount_mib": 2}),
        (204, "PATCH", "/vm", {"state": "Paused"}),
        (204, "PATCH", "/vm", {"state": "Resumed"}),
        (204, "PATCH", "/mmds", {"a": None}),
        (204, "PUT", "/actions", {"action_type": "FlushMetrics"}),
        (200, "GET", "/metrics/prometheus", None),
        (200, "GET", "/openapi.json", None),
        (200, "GET", "/balloon", None),
        (400, "PUT", "/snapshot/create", {"snapshot_path": "/s", "mem_file_path": "/m"}),
    ]
    for status, method, path, body in requests:
        answer = jail.request(method, path, body)
        assert answer[0] == status, (method, path, answer)
    os.kill(jail.pid, signal.SIGTERM)
    assert jail.end().splitlines()[-1] == "imports tried in the jail:"
    assert (jail.root / "metrics").read_text().count("\n") >= 2


@pytest.mark.parametrize("peer", ["pyvmm", "Firecracker 1.12.1"])
def test_a_jail_of_root_opens_what_root_opens(tmp_path: Path, peer: str) -> None:
    jail = Jailed(tmp_path, uid=0)
    try:
        for name in ("log", "metrics"):
            os.mkfifo(jail.root / name)
            (jail.root / name).chmod(0)
        jail.put("kernel", Path(write_guest(jail.base, IDLE)))
        jail.put("disk", bytes(DISK))
        for name in ("kernel", "disk"):
            os.chown(jail.root / name, UID, UID)
            (jail.root / name).chmod(0o600)
        fifos = [os.open(jail.root / name, os.O_RDONLY | os.O_NONBLOCK) for name in ("log", "metrics")]
        command = None
        if peer != "pyvmm":
            jail.program.unlink()
            shutil.copy(firecracker(), jail.program)
            command = jailer()
        jail.start(command=command)
        for path, body in (
            ("/logger", {"log_path": "/log", "level": "Debug"}), ("/metrics", {"metrics_path": "/metrics"}),
            ("/boot-source", {"kernel_image_path": "/kernel", "boot_args": ""}), ("/drives/d", disk()),
            ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 32}), ("/actions", {"action_type": "InstanceStart"}),
        ):  # fmt: skip
            answer = jail.request("PUT", path, body)
            assert answer[0] == 204, (path, answer)
        assert os.read(fifos[0], 1 << 16)
        for fd in fifos:
            os.close(fd)
    finally:
        jail.close()


def test_a_jail_of_root_has_one_capability(tmp_path: Path) -> None:
    jail = Jailed(tmp_path, uid=0)
    try:
        jail.start()
        jail.request("GET", "/")
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{jail.pid}/status").read_text().splitlines())
        have = [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
        assert have == [0, 2, 2, 0, 0]
    finally:
        jail.close()


def test_a_daemon_in_a_pid_namespace_of_its_own(jail: Jailed) -> None:
    guest(jail, None, **everything(jail))
    jail.start("--daemonize", "--new-pid-ns", vmm=("--config-file", "/config.json"))
    assert jail.process is not None
    jail.end()  # the jailer; the VMM goes on
    assert until(lambda: jail.request("GET", "/"))[1]["state"] in ("Running", "Not started")
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{jail.pid}/status").read_text().splitlines())
    assert status["NSpid"].split()[1] == "1"
    assert status["NSsid"].split()[-1] == "0", "its session is of a process outside"
    assert {os.readlink(f"/proc/{jail.pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    os.kill(jail.pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{jail.pid}/root/run").exists())


@pytest.mark.parametrize("options", [(), ("--new-pid-ns",)])
def test_once_the_jailer_of_a_daemon_ends_all_is_there(jail: Jailed, options: tuple[str, ...]) -> None:
    guest(jail, None)
    jail.start("--daemonize", *options, vmm=("--config-file", "/config.json"))
    jail.end()
    assert (jail.root / "firecracker.pid").read_text() == str(jail.pid)
    assert Path(f"/proc/{jail.pid}").exists() and not (jail.root / "firecracker.pid.new").exists()
    with socket.socket(socket.AF_UNIX) as client, contextlib.chdir(jail.root / "run"):
        client.connect("firecracker.socket")
    assert jail.request("GET", "/")[1]["state"] == "Running"


@pytest.mark.parametrize("options", [(), ("--new-pid-ns",)])
def test_a_daemon_that_does_not_start_says_why(jail: Jailed, options: tuple[str, ...]) -> None:
    jail.put("log", b"")
    jail.put("junk", b"no kernel")
    config = jail.configure(
        boot_source={"kernel_image_path": "/junk"}, drives=[], machine_config={"vcpu_count": 1, "mem_size_mib": 16}
    )
    jail.start("--daemonize", *options, vmm=(*config, "--log-path", "/log"))
    assert jail.process is not None
    _, told = jail.process.communicate(timeout=30)
    assert jail.process.returncode == 1
    assert told.endswith("kernel /junk: is neither an ELF kernel nor a bzImage\n") and told.count("\n") == 1
    lines = (jail.root / "log").read_text().splitlines()
    assert "kernel /junk: is neither an ELF kernel nor a bzImage" in lines[-2]
    assert lines[-1].endswith("Firecracker exiting with error. exit_code=1")


def test_what_a_jailed_vmm_is(jail: Jailed) -> None:
    jail.start()
    jail.request("GET", "/")
    assert jail.process is not None and jail.pid == jail.process.pid
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{jail.pid}/status").read_text().splitlines())
    assert status["Name"] == "firecracker"
    assert status["Uid"].split() == status["Gid"].split() == [str(UID)] * 4
    assert status["Groups"].strip() == ""
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    until(lambda: {task.read_text() for task in Path(f"/proc/{jail.pid}/task").glob("*/comm")} >= {"fc_api\n"})
    until(lambda: all(
        "\nSeccomp:\t2\n" in task.read_text() for task in Path(f"/proc/{jail.pid}/task").glob("*/status")
    ))  # fmt: skip
    assert not Path(f"/proc/{jail.pid}/environ").read_bytes().strip(b"\0")
    limits = Path(f"/proc/{jail.pid}/limits").read_text()
    assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")] == [["2048"] * 2]
    mounts = [line.split()[1:3] for line in Path(f"/proc/{jail.pid}/mounts").read_text().splitlines()]
    assert mounts[1:] == [["/proc", "proc"]]
    assert sorted(path.name for path in jail.root.iterdir()) == ["dev", "firecracker.pid", "proc", "run"]
    for name in ("dev/kvm", "dev/net/tun", "dev/urandom", "dev/userfaultfd"):
        device, own = Path("/", name).stat(), (jail.root / name).stat()
        assert (own.st_rdev, own.st_uid, own.st_gid, own.st_mode & 0o777) == (device.st_rdev, UID, UID, 0o600)


def test_memory_comes_from_a_handler_outside_the_jail(tmp_path: Path) -> None:
    first = Jailed(tmp_path / "1")
    second = Jailed(tmp_path / "2")
    try:
        first.start(vmm=guest(first, None))
        assert first.request("PATCH", "/vm", {"state": "Paused"})[0] == 204
        files = {"snapshot_path": "/snap", "mem_file_path": "/mem"}
        assert first.request("PUT", "/snapshot/create", files) == (204, "")
        second.put("snap", first.root / "snap")
        script = Path(__file__).parents[2] / "examples/uffd_handler.py"
        memory = first.root / "mem"
        with subprocess.Popen([sys.executable, script, "handler", memory], cwd=second.root) as handler:
            try:
                socket_of_it = second.root / "handler"
                until(socket_of_it.exists)
                os.chown(socket_of_it, UID, UID)
                second.start()
                backend = {"backend_type": "Uffd", "backend_path": "/handler"}
                load = {"snapshot_path": "/snap", "mem_backend": backend, "resume_vm": True}
                assert second.request("PUT", "/snapshot/load", load) == (204, "")
                assert second.request("PATCH", "/vm", {"state": "Paused"})[0] == 204
                assert second.request("PUT", "/snapshot/create", files) == (204, ""), "behind the API's own filter"
                assert (second.root / "mem").stat().st_size == memory.stat().st_size
                second.close()
                assert handler.wait(PATIENCE) == 0
            finally:
                handler.kill()
    finally:
        first.close()
        second.close()


def test_a_mount_of_the_host_reaches_the_jail_later(tmp_path: Path) -> None:
    # As Kata hot-plugs a drive: a bind mount below the jail's root, then a PATCH.
    shared = ["unshare", "--mount", "--propagation", "shared"]
    script = f"""
import os, subprocess, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.jail.jailed import Jailed
from tests.jail.test_jailed import guest
jail = Jailed(Path({str(tmp_path / "jail")!r}))
try:
    jail.put("disk", bytes({DISK}))
    image = Path({str(tmp_path / "image")!r}); image.write_bytes(bytes({2 * DISK})); os.chown(image, {UID}, {UID})
    jail.start(vmm=guest(jail, None, drives=[{disk()!r}]))
    assert jail.request("GET", "/")[0] == 200
    (jail.root / "hotplug").touch()
    subprocess.run(["mount", "--bind", image, jail.root / "hotplug"], check=True)
    answer = jail.request("PATCH", "/drives/d", {{"drive_id": "d", "path_on_host": "/hotplug"}})
    assert answer[0] == 204, answer
    fds = set()
    for fd in Path(f"/proc/{{jail.pid}}/fd").iterdir():
        try:
            fds.add(os.readlink(fd))
        except FileNotFoundError:
            pass  # of a client that has ended
    assert "/hotplug" in fds, fds
finally:
    jail.close()
"""
    subprocess.run([*shared, sys.executable, "-c", script], check=True, timeout=PATIENCE, env=dict(os.environ))


def test_a_signal_ends_it_at_once(jail: Jailed) -> None:
    guest(jail, None, **everything(jail))
    jail.start(vmm=("--config-file", "/config.json"))
    until(lambda: jail.request("GET", "/")[1]["state"] == "Running")
    os.kill(jail.pid, signal.SIGTERM)
    jail.end()
