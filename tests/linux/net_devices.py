# SPDX-License-Identifier: Apache-2.0
"""A Linux with three network interfaces: over a tap with two queues, over a tap of our own, over passt.

python -m tests.linux.net_devices        # where KVM runs Linux, as root; writes one JSON object
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.linux import kernels
from tests.linux.tools_guest import Guest
from vmm.images import initramfs

PYVMM = [sys.executable, "-m", "vmm", "run"]
INIT = (
    initramfs.LOAD_MODULES
    + r"""
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr -icanon min 1 ixon
ip link set lo up
echo "@ready"
while IFS= read -r line; do
    eval "$line"
    echo "
@done $?"
done
"""
)
UDHCPC = r"""#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
for gateway in $router; do ip route replace default via "$gateway" dev "$interface"; done
echo "$ip $router" >/tmp/lease
"""
DATA = os.urandom(4 << 20)
MISTAKES = ("tap=nothing", "tap=lo", "fd=77", "auto,mac=01:00:00:00:00:01", "auto,pcap=/nowhere/x", "auto,addr=1.2.3/9")
RELOAD = "reload virtio_net"


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def outside_chroot(command: list[str]) -> list[str]:
    """The command; in the lab outside of its chroot, in which passt could not have a user namespace."""
    if not os.path.exists("/proc/1/root/job/run"):
        return command
    script = 'cd /new && busybox mount --move . / && exec busybox chroot . /usr/bin/env -C "$@"'
    shell = ["busybox", "unshare", "-m", "busybox", "sh", "-c", script, "sh", os.getcwd()]
    return ["chroot", "/proc/1/root", *shell, *command]


def mistake(kernel: str, net: str) -> tuple[int, str]:
    """The status and the errors of a run with one option that is wrong."""
    done = subprocess.run([*PYVMM, kernel, "--net", net], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    return done.returncode, done.stderr.decode(errors="replace")


def host_ping(address: str) -> bool:
    return subprocess.run(["busybox", "ping", "-c", "3", "-W", "5", address], capture_output=True).returncode == 0


def serve(directory: str) -> http.server.ThreadingHTTPServer:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            Path(directory, "put").write_bytes(body)
            self.send_response(200)
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("0.0.0.0", 8000), functools.partial(Quiet, directory=directory))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def exercise(guest: Guest, facts: dict[str, Any]) -> None:
    """All three interfaces; `facts` has what was found before it went wrong, too."""
    host = facts["host"] = {}
    facts["queues"] = guest.ask("ls /sys/class/net/eth0/queues").split()
    facts["macs"] = guest.ask("cat /sys/class/net/eth[012]/address").split()
    facts["mtus"] = guest.ask("cat /sys/class/net/eth[012]/mtu").split()
    for part in ("", "reloaded "):
        guest.ask("ip link set eth0 up; ip addr add 10.9.8.2/24 dev eth0")
        guest.ask("ip link set eth1 up; ip addr add 10.8.8.2/24 dev eth1")
        facts[part + "ping"] = guest.try_("ping -c 3 -W 5 10.9.8.1 && ping -c 3 -W 5 10.8.8.1")
        host[part + "ping"] = [host_ping("10.9.8.2"), host_ping("10.8.8.2")]
        facts[part + "get"] = guest.ask("wget -q -O - http://10.9.8.1:8000/data | md5sum", 100).split()[0]
        if not part:
            guest.ask(RELOAD)
    guest.ask("wget -q -O /tmp/data http://10.8.8.1:8000/data", 100)
    put = "printf 'PUT /put HTTP/1.0\\r\\nContent-Length: %d\\r\\n\\r\\n' $(stat -c %s /tmp/data)"
    facts["put"] = guest.ask(f"{{ {put}; cat /tmp/data; }} | nc 10.9.8.1 8000", 100)
    guest.ask("ip link set eth2 up")
    facts["dhcp"] = guest.try_("udhcpc -i eth2 -n -q -t 5 -s /usr/lib/pyvmm/udhcpc", 60)
    facts["lease"] = guest.try_("cat /tmp/lease")[1].split()
    facts["by passt"] = guest.try_("wget -q -O - http://${lease:-$(cut -d' ' -f2 /tmp/lease)}:8000/data | md5sum", 100)
    guest.tell("poweroff -f")
    facts["status"] = guest.process.wait(30)


def main() -> int:
    made = kernels.kernel()
    facts: dict[str, Any] = {"md5": hashlib.md5(DATA).hexdigest()}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "data").write_bytes(DATA)
        initrd = Path(directory, "net.cpio")
        initrd.write_bytes(made.initrd(["virtio_mmio", "virtio_net"], INIT, {"usr/lib/pyvmm/udhcpc": UDHCPC.encode()}))
        ip("tuntap add net7 mode tap multi_queue")
        ip("addr add 10.9.8.1/24 dev net7")
        ip("link set net7 up")
        ip("tuntap add up7 mode tap")  # passt wants a way out
        ip("addr add 10.7.7.5/24 dev up7")
        ip("link set up7 up")
        ip("route add default via 10.7.7.1 dev up7")
        server = serve(directory)
        facts["mistakes"] = {net: mistake(made.path, net) for net in MISTAKES}
        command = [
            *PYVMM, made.path, "--initrd", str(initrd), "--cpus", str(kernels.cpus(2)), "--memory", "256M",
            "--append", "quiet",
            "--net", "tap=net7,queues=2,mac=06:00:ac:10:00:02", "--net", "auto,addr=10.8.8.1/24,mtu=4000",
            "--net", "user,loopback",
        ]  # fmt: skip
        try:
            with Guest("net", outside_chroot(command)) as guest:
                guest.wait_ready(100)
                exercise(guest, facts)
                guest._stderr.seek(0)
                facts["stderr"] = guest._stderr.read().decode(errors="replace")
            facts["left"] = [name for name in os.listdir("/sys/class/net") if name.startswith("pyvmm")]
            put = Path(directory, "put")
            facts["put_md5"] = hashlib.md5(put.read_bytes()).hexdigest() if put.exists() else None
        except Exception as error:  # what was found before is worth more
            facts["error"] = f"{type(error).__name__}: {error}"
        finally:
            server.shutdown()
    json.dump(facts, sys.stdout)
    return 1 if "error" in facts else 0


if __name__ == "__main__":
    sys.exit(main())
