# SPDX-License-Identifier: Apache-2.0
"""Results of the asyncio twins that nobody waits for any more."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vmm.test_sandbox_host import ABOUT
from tests.waiting import until
from vmm.sandbox import AsyncSandbox, CommandTimeout, Session
from vmm.sandbox.aio import in_thread
from vmm.sandbox.channel import Link


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_result_that_comes_when_the_loop_is_closed_is_undone_once(cancelled: bool) -> None:
    undone: list[str] = []
    goes_on = threading.Event()

    def work() -> str:
        goes_on.wait(10)
        return "thing"

    loop = asyncio.new_event_loop()
    task = loop.create_task(in_thread(work, undo=undone.append))
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # what asyncio would say is meant here
    loop.run_until_complete(asyncio.sleep(0.01))
    if cancelled:
        task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    goes_on.set()
    until(lambda: undone == ["thing"])
    until(lambda: "sandbox call" not in [each.name for each in threading.enumerate()])
    assert undone == ["thing"]


@pytest.mark.parametrize("late", [False, True], ids=["as it comes", "after it came"])
def test_a_result_that_a_cancelled_task_does_not_take_is_undone(late: bool) -> None:
    undone: list[str] = []
    worked = threading.Event()

    def work() -> str:
        worked.set()
        return "thing"

    async def scenario() -> None:
        task = asyncio.create_task(in_thread(work, undo=undone.append))
        await asyncio.sleep(0)
        worked.wait(10)
        time.sleep(0.05)  # now the loop has been told, and has not looked
        if late:
            asyncio.get_running_loop().call_soon(task.cancel)
        else:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            undone.append(await task)

    asyncio.run(scenario())
    until(lambda: undone == ["thing"])


def test_a_port_that_a_cancelled_task_does_not_take_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = AsyncSandbox.__new__(AsyncSandbox)
    sandbox.sync = Session(Link(str(tmp_path / "v")), ABOUT)  # type: ignore[assignment]  # a port needs no more of it
    made: list[socket.socket] = []

    def create_server(*args: Any) -> socket.socket:
        made.append(socket.create_server(*args))
        return made[0]

    async def scenario() -> None:
        task = asyncio.create_task(sandbox.publish(80))
        await asyncio.sleep(0)
        until(lambda: made)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with monkeypatch.context() as patch:
        patch.setattr("vmm.sandbox.ports.socket", SimpleNamespace(**{**vars(socket), "create_server": create_server}))
        asyncio.run(scenario())
        until(lambda: made[0].fileno() < 0)


def test_a_time_limit_is_for_the_start_and_the_command_together(tmp_path: Path) -> None:
    def serve(listener: socket.socket) -> None:
        stream, _ = listener.accept()
        with stream:
            time.sleep(0.4)
            stream.sendall(b"OK 1\n")
            while stream.recv(1 << 16):
                pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "v"))
        listener.listen()
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        sandbox = AsyncSandbox.__new__(AsyncSandbox)
        sandbox.sync = Session(Link(str(tmp_path / "v")), ABOUT)  # type: ignore[assignment]  # run() needs no more of it
        begun = time.monotonic()
        with pytest.raises(CommandTimeout):
            asyncio.run(sandbox.run("x", timeout=0.5))
        assert time.monotonic() - begun < 0.8
