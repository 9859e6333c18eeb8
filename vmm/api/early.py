# SPDX-License-Identifier: Apache-2.0
"""The first questions of a runtime, ``GET /`` and ``GET /version``, answered while the rest is still imported."""

from __future__ import annotations

import threading

from vmm.api import API_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.api.server import Answer

_ENDING = b'{"fault_message":"The VMM is ending."}'


class Early:
    """Answers the two itself, and all others by what ``set_answer`` brings, for which they wait. Any thread.

    :param vmm_id: letters, digits and hyphens
    """

    def __init__(self, vmm_id: str) -> None:
        info = f'{{"id":"{vmm_id}","state":"Not started","vmm_version":"{API_VERSION}","app_name":"Firecracker"}}'
        self._known = {"/": info.encode(), "/version": f'{{"firecracker_version":"{API_VERSION}"}}'.encode()}
        self.first = threading.Event()  # there was a question
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._answer: Answer | None = None
        self._answered: list[str] = []

    def __call__(self, method: str, path: str, body: bytes) -> tuple[int, bytes, tuple[str, ...]]:
        with self._lock:
            if not self._ready.is_set() and method == "GET" and path in self._known and not body:
                self._answered.append("instance_info_count" if path == "/" else "vmm_version_count")
                self.first.set()
                return 200, self._known[path], ()
        self.first.set()
        self._ready.wait()
        return (500, _ENDING, ()) if self._answer is None else self._answer(method, path, body)

    def set_answer(self, answer: Answer | None, count: Callable[[str], None] = lambda field: None) -> None:
        """From here on, `answer` answers all requests; None: each gets status 500, because the VMM ends.

        :param count: called before that, for each answer so far, with the field of the metrics' ``get_api_requests``
            that counts it
        """
        with self._lock:
            for field in self._answered:
                count(field)
            self._answer = answer
            self._ready.set()
