# SPDX-License-Identifier: Apache-2.0
"""``python3.X tools/try_wheel.py WHEEL``: install a wheel in an empty environment and try its programs, with filters.

The Linux is the image busybox (``pyvmm pull busybox``). On a software KVM its kernel is ``PYVMM_SANDBOX_KERNEL``,
as ``python -m tests.linux.r3`` prints it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import venv
from pathlib import Path

GUEST = """
from vmm.testing import tiny_guest
tiny_guest(".", bytes.fromhex("b0 07 e6 f4"))  # mov al, 7; out 0xf4, al
"""
SERVE = """
import http.client, json, socket, subprocess, sys, time
from pathlib import Path

def put(path, body):
    link = http.client.HTTPConnection("localhost")
    link.sock = socket.socket(socket.AF_UNIX)
    link.sock.connect("api.sock")
    link.request("PUT", path, json.dumps(body))
    status = link.getresponse().status
    assert status == 204, (path, status)

config = {"boot-source": {"kernel_image_path": "guest.elf"}, "pyvmm": {"exit_port": 0xf4}}
Path("config.json").write_text(json.dumps(config))
assert subprocess.run(["pyvmm", "serve", "--no-api", "--config-file", "config.json"]).returncode == 7
server = subprocess.Popen(["pyvmm", "serve", "--api-sock", "api.sock"])
try:
    end = time.monotonic() + 30
    while not Path("api.sock").exists():
        assert server.poll() is None and time.monotonic() < end, "no socket"
        time.sleep(0.01)
    put("/boot-source", {"kernel_image_path": "guest.elf"})
    put("/machine-config", {"vcpu_count": 2, "mem_size_mib": 64})
    put("/actions", {"action_type": "InstanceStart"})
finally:
    server.terminate()
assert server.wait(30) == 0
"""
FORK = """
from vmm import Image, Machine

with Machine("guest.elf", memory="16M") as vm:
    vm.freeze().save("frozen")
    children = vm.fork(2) + vm.fork(1, isolated=True)
    assert [child.wait(timeout=30).code for child in children] == [7, 7, 7]
    for child in children:
        child.close()
with Machine(image=Image.load("frozen")) as copy:
    copy.start()
    assert copy.wait(timeout=30).code == 7
"""
LINUX = """
import os, subprocess
from vmm import images

image = images.resolve("busybox")
kernel = os.environ.get("PYVMM_SANDBOX_KERNEL") or image.kernel
command = ["pyvmm", "run", kernel, "--initrd", image.initrd, "--memory", "256M", "--append", 'quiet -- sh -c "exit 5"']
status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=120).returncode
assert status == 5, status
"""
SANDBOX = """
from vmm import Sandbox

with Sandbox("busybox", memory="256M") as sandbox:
    assert sandbox.run("sort", input=b"3\\n1\\n2\\n").stdout == "1\\n2\\n3\\n"
    (copy,) = sandbox.fork()
    with copy:
        assert copy.run("uname -s").stdout == "Linux\\n"
"""


def main(wheel: str) -> int:
    """Try `wheel` with this interpreter; 1 if something fails."""
    with tempfile.TemporaryDirectory() as directory:
        bin = Path(directory, "venv", "bin")
        venv.create(bin.parent, with_pip=True)
        environment = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        steps: dict[str, list[str]] = {
            "pip install": ["pip", "install", wheel],
            "pyvmm --version": ["pyvmm", "--version"],
            "pyvmm check": ["pyvmm", "check"],
            "a tiny guest is made": ["python", "-c", GUEST],
            "pyvmm run": ["sh", "-c", "pyvmm run guest.elf; test $? = 7"],
            "pyvmm serve, by file and by requests": ["python", "-c", SERVE],
            "pyvmm prepare": ["pyvmm", "prepare"],
            "pyvmm run, prepared": ["sh", "-c", "PYVMM_START=warm pyvmm run guest.elf; test $? = 7"],
            "pyvmm serve, prepared": ["env", "PYVMM_START=warm", "python", "-c", SERVE],
            "freeze, load, fork, fork into processes": ["python", "-c", FORK],
            "pyvmm run of a Linux": ["python", "-c", LINUX],
            "Sandbox, run and fork": ["python", "-c", SANDBOX],
        }
        failed = []
        for name, command in steps.items():
            done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
            print("failed" if done.returncode else "ok    ", name, flush=True)
            if done.returncode:
                print(textwrap.indent(done.stdout + done.stderr, "    "), flush=True)
                failed.append(name)
    result = f"failed: {', '.join(failed)}" if failed else "all ok"
    print(f"{Path(wheel).name}, Python {sys.version.split()[0]}: {result}")
    return bool(failed)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(os.path.abspath(sys.argv[1])))
