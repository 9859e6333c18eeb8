# SPDX-License-Identifier: Apache-2.0
"""Stands for QEMU with the lab's machine in it: keeps the ports' protocol, runs the command right here.

``FAKE_LAB`` says how it fails: ``stillborn`` (before it is up), ``once`` (so, but only the first time), ``dies``
(under the command), ``mute`` (runs, and is never up), ``lost`` (one of its CPUs does nothing). Into the file
``FAKE_LAB_SHOWN`` it writes what would be its root.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


def main(argv: list[str]) -> None:
    """Take QEMU's arguments and be the machine."""
    options = list(itertools.pairwise(argv))
    values = [dict(part.partition("=")[::2] for part in value.split(",")) for _, value in options]
    ports = {value["id"]: socket.socket(fileno=int(value["fd"])) for value in values if "socket" in value}
    job = next(Path(value["path"]) for value in values if value.get("id") == "job" and "path" in value)
    how = os.environ.get("FAKE_LAB", "")
    if log := os.environ.get("FAKE_LAB_SHOWN"):
        host = next(value["path"] for value in values if value.get("id") == "host")
        Path(log).write_text("\n".join([host, *sorted(os.listdir(host))]))
    console = next(value for option, value in options if option == "-serial").removeprefix("file:")
    Path(console).write_text("a line on the console\n")
    boots = Path(os.environ["FAKE_LAB_BOOTS"])
    boots.write_text(boots.read_text() + f"{os.getpid()}\n" if boots.exists() else f"{os.getpid()}\n")
    if how == "stillborn" or (how == "once" and boots.read_text().count("\n") == 1):
        sys.exit("qemu-system-x86_64: no such machine")
    if how == "mute":
        time.sleep(600)
    script = (job / "run").read_text().replace("/run/pyvmm-lab.pid", "/dev/null")
    child = subprocess.Popen(
        ["sh", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),  # a machine's processes end with it
    )  # fmt: skip
    control = ports["control"].makefile("rwb", 0)
    control.write(b"up\n")
    if how == "dies":
        os._exit(1)
    if how == "lost":
        Path("/proc/self/comm").write_text("CPU 1/TCG")

    def obey() -> None:
        for name in control:
            os.killpg(child.pid, signal.Signals[f"SIG{name.decode().strip()}"])

    def feed() -> None:
        assert child.stdin is not None
        source = ports["in"].makefile("rb", 0)
        with child.stdin as sink:
            while (job / "terminal").exists() and (data := source.read(1 << 16)):
                sink.write(data)
                sink.flush()
            while size := int(source.readline()):
                sink.write(source.read(size))

    def pump(source: int, port: socket.socket) -> None:
        while data := os.read(source, 4096):
            port.sendall(data)

    assert child.stdout is not None and child.stderr is not None
    for job_of in (obey, feed):
        threading.Thread(target=job_of, daemon=True).start()
    pumps = [
        threading.Thread(target=pump, args=(source.fileno(), ports[name]))
        for source, name in ((child.stdout, "out"), (child.stderr, "err"))
    ]
    for thread in pumps:
        thread.start()
    for thread in pumps:
        thread.join()
    status = child.wait()
    control.write(f"exit {status if status >= 0 else 128 - status}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
