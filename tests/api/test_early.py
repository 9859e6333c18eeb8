# SPDX-License-Identifier: Apache-2.0
"""What answers the first questions while the rest is imported."""

from __future__ import annotations

import threading
import time

from vmm.api.early import Early


def test_early_answers_are_counted_before_another_request_is_answered() -> None:
    early = Early("a")
    early("GET", "/", b"")
    early("GET", "/version", b"")
    counted: list[str] = []
    seen: list[list[str]] = []

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
        seen.append([*counted])
        return 200, b"", ()

    def count(field: str) -> None:
        time.sleep(0.05)
        counted.append(field)

    waiting = threading.Thread(target=early, args=("GET", "/metrics/prometheus", b""))
    waiting.start()
    early.set_answer(answer, count)
    waiting.join()
    assert seen == [["instance_info_count", "vmm_version_count"]]
