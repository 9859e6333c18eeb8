# SPDX-License-Identifier: Apache-2.0
"""Jupyter kernels in VMs: each notebook has a copy of one sandbox, in which a kernel already waits.

pyvmm pull debian --packages python3-ipykernel --size 2G --refresh
python examples/notebook_kernel.py [--image IMAGE] [--notebooks N] [CELL ...]

With cells, each notebook runs them, and their output is printed; this needs ``pip install jupyter_client``. Without
cells, it prints how Jupyter's console connects to each notebook, and waits for Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vmm import Sandbox, VmmError

# In the guest; the host's are any that are free.
PORTS = {"shell_port": 5501, "iopub_port": 5502, "stdin_port": 5503, "control_port": 5504, "hb_port": 5505}
PULL = "pyvmm pull debian --packages python3-ipykernel --size 2G --refresh"
KERNEL = "exec python3 -m ipykernel_launcher -f /run/kernel.json >/run/kernel.log 2>&1"
TIMEOUT = 60  # seconds: of a kernel's start, and of each cell


def start_kernel(sandbox: Sandbox) -> dict[str, Any]:
    """Start a kernel, and wait until it listens; returns what its clients need to know.

    The key is the same in all copies: whoever can read one connection file can talk to each of them.
    """
    connection = {
        "transport": "tcp", "ip": "127.0.0.1", **PORTS, "key": secrets.token_hex(32), "signature_scheme": "hmac-sha256",
    }  # fmt: skip
    sandbox.files.write("/run/kernel.json", json.dumps(connection), mode=0o600)
    end = time.monotonic() + TIMEOUT
    with sandbox.exec(KERNEL, cwd="/root", keep=True) as process:
        while not listens(sandbox):
            if process.poll() is not None or time.monotonic() > end:
                said = sandbox.files.read("/run/kernel.log").strip().splitlines()[-1:]
                sys.exit(f"notebook_kernel: the image has no kernel that starts: {''.join(said)}\nmake one: {PULL}")
            time.sleep(0.05)
    return connection


def listens(sandbox: Sandbox) -> bool:
    """Whether the kernel listens on all its ports."""
    try:
        for port in PORTS.values():
            sandbox.connect(port).close()
    except ConnectionRefusedError:
        return False
    return True


def publish(sandbox: Sandbox, connection: dict[str, Any], path: Path, stack: contextlib.ExitStack) -> None:
    """Publish the kernel's ports on this host's loopback, and write a connection file that leads Jupyter there."""
    ports = {name: stack.enter_context(sandbox.publish(port)).address[1] for name, port in PORTS.items()}
    path.write_text(json.dumps({**connection, **ports}))


def run_cells(path: Path, cells: list[str]) -> bool:
    """Run cells and print their output, up to the first that fails; returns whether none did."""
    from jupyter_client import BlockingKernelClient

    client = BlockingKernelClient(connection_file=str(path))
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=TIMEOUT)
        replies = (client.execute_interactive(c, allow_stdin=False, timeout=TIMEOUT, output_hook=show) for c in cells)
        return all(reply["content"]["status"] == "ok" for reply in replies)
    except (RuntimeError, TimeoutError) as error:  # the kernel is busy, or has ended
        print(f"notebook_kernel: {error}", file=sys.stderr)
        return False
    finally:
        client.stop_channels()


def show(message: dict[str, Any]) -> None:
    """Print what a cell says."""
    content = message["content"]
    match message["header"]["msg_type"]:
        case "stream":
            print(content["text"], end="")
        case "execute_result" | "display_data":
            print(content["data"].get("text/plain", ""))
        case "error":
            print(f"{content['ename']}: {content['evalue']}")


def main(image: str, notebooks: int, cells: list[str]) -> int:
    """Give each notebook a copy of a warm sandbox; returns how many had a cell that failed."""
    with contextlib.ExitStack() as stack:
        with Sandbox(image) as warm:
            connection = start_kernel(warm)
            copies = [stack.enter_context(copy) for copy in warm.fork(notebooks)]
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="notebooks-"))  # nobody else may read it
        paths = [Path(directory, f"{copy.name}.json") for copy in copies]
        for copy, path in zip(copies, paths, strict=True):
            publish(copy, connection, path, stack)
        if cells:
            return sum(not run_cells(path, cells) for path in paths)
        print(*(f"jupyter console --existing {path}" for path in paths), sep="\n", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(epilog=f"An image with a kernel: {PULL}")
    parser.add_argument("--image", default="debian")
    parser.add_argument("--notebooks", type=int, default=1)
    parser.add_argument("cells", nargs="*", metavar="CELL")
    options = parser.parse_args()
    if options.cells and not importlib.util.find_spec("jupyter_client"):
        parser.error("cells need jupyter_client: pip install jupyter_client")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(**vars(options)))
    except (VmmError, KeyboardInterrupt) as error:
        sys.exit(f"notebook_kernel: {str(error) or 'ended'}")
