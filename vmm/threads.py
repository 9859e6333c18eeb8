# SPDX-License-Identifier: Apache-2.0
"""Start the threads of a VM, each behind the filter of its kind (``vmm.jail.seccomp``) unless filters are off.

Only the main thread gets signals: see ``vmm.signals``.
"""

from __future__ import annotations

import sys
import threading

from vmm.errors import HostError
from vmm.signals import deaf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Guard(Protocol):
        """What ``vmm.jail.seccomp`` puts in the way of every thread."""

        @property
        def alone(self) -> bool: ...
        def confines(self) -> bool: ...
        def start(self, thread: threading.Thread) -> None: ...
        def install(self, kind: str, below: tuple[int, bool] | None = None) -> None: ...


guard: Guard | None = None  # of the whole process
# Why it can start no other program: a clause for a ConfigError; empty: it can.
no_programs = ""


def traced() -> bool:
    """Whether a debugger or profiler looks into every thread: it does there what no filter allows."""
    monitoring = getattr(sys, "monitoring", None)  # since Python 3.12
    tools = () if monitoring is None else map(monitoring.get_tool, range(6))
    return any(tools) or threading.gettrace() is not None or threading.getprofile() is not None


def spawn(
    kind: str | None,
    name: str,
    target: Callable[..., None],
    *args: object,
    below: tuple[int, bool] | None = None,
    unconfined: Callable[[HostError], object] | None = None,
) -> threading.Thread:
    """Start a daemon thread.

    :param kind: what it will do, which decides what it may ask of the host: one of ``vmm.jail.seccomp.KINDS``;
        None: what an embedding program's code does, so it has no filter
    :param name: name of the thread in Python
    :param below: descriptor of the only directory below which it opens files, where the kernel has Landlock, and
        whether it changes any; open until the thread runs. None: as its kind says
    :param unconfined: called on the thread in `target`'s place where its filter could not be had, as without a
        descriptor left; None: one line on stderr says so
    :raises RuntimeError: the host has no thread left
    :raises HostError: the filters could not be had
    """

    def run() -> None:
        deaf()
        try:
            enter(kind, below)
        except HostError as error:
            if unconfined is not None:
                unconfined(error)
            elif sys.stderr is not None:
                print(f"pyvmm: {name}: {error}", file=sys.stderr)
            return
        target(*args)

    thread = threading.Thread(target=run, name=name, daemon=True)
    if guard is None:
        thread.start()
    else:
        guard.start(thread)
    return thread


def enter(kind: str | None, below: tuple[int, bool] | None = None) -> None:
    """From here on the calling thread does only what its kind does; nothing for None, or where filters are off."""
    if guard is not None and kind is not None:
        guard.install(kind, below)
