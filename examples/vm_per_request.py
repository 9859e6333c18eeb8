# SPDX-License-Identifier: Apache-2.0
"""An HTTP server that computes each answer in a VM of its own: a copy of one that is ready, closed afterwards.

    python examples/vm_per_request.py 8000 &
    curl 'http://127.0.0.1:8000/?7'     # 49

What a request does to its VM, no other request sees. It needs GNU as and ld (Debian: binutils).
"""

from __future__ import annotations

import http.server
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vmm import Machine, Pool
from vmm.testing import tiny_guest

READY, ARGUMENT, RESULT = 0x200000, 0x200004, 0x200008
# The guest gets ready, waits for its argument, squares it, and ends.
GUEST = f"""
    mov dword ptr [{READY}], 1
wait:
    mov eax, [{ARGUMENT}]
    test eax, eax
    jz wait
    imul eax, eax
    mov [{RESULT}], eax
    mov al, 0
    out 0xf4, al
"""


@contextmanager
def pool(size: int = 4) -> Iterator[Pool]:
    """Copies of a guest that is ready. They hold what they have in common once."""
    with tempfile.TemporaryDirectory() as directory, Machine(tiny_guest(directory, GUEST), memory="16M") as vm:
        vm.start()
        while not vm.memory.read(READY, 1)[0]:
            time.sleep(0.001)
        vm.pause()  # or its loop takes a CPU for as long as the server runs
        with Pool(vm, size=size) as made:
            yield made


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers ``GET /?N`` with N squared, modulo 2^32; N is 1 to 4294967295."""

    pool: Pool

    def do_GET(self) -> None:
        word = self.path.partition("?")[2]
        if not (word.isascii() and word.isdigit() and 0 < int(word) < 1 << 32):
            return self.send_error(400, "the query must be a number from 1 to 4294967295")
        with self.pool.take(timeout=10) as vm:
            vm.memory.write(ARGUMENT, int(word).to_bytes(4, "little"))
            if vm.wait(timeout=10) is None:
                return self.send_error(504, "the VM did not answer within 10 s")
            result = int.from_bytes(vm.memory.read(RESULT, 4), "little")
        body = f"{result}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(port: str = "8000") -> None:
    """Serve on the loopback until Ctrl-C."""
    with pool() as Handler.pool, http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/?7", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
