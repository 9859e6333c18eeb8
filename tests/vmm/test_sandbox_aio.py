# SPDX-License-Identifier: Apache-2.0
"""Results of the asyncio twins that nobody waits for any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from tests.waiting import until
from vmm.sandbox.aio import in_thread


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
