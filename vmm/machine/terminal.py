# SPDX-License-Identifier: Apache-2.0
"""The terminal of a command that joins it to a guest's: every key is the guest's, and afterwards it is as before."""

from __future__ import annotations

import errno
import signal
import termios
import threading
import tty
from contextlib import contextmanager

from vmm.machine.console import set_mode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType
    from typing import Any

    Handler = Callable[[int, FrameType | None], object]


@contextmanager
def raw(terminal: int | None, handlers: Mapping[int, Handler]) -> Iterator[None]:
    """A context manager: a terminal in raw mode, and in the main thread handlers of signals.

    :param terminal: its descriptor, or None: there is no terminal, only signals
    :param handlers: by signal, besides those that end this process by an exception
    """
    before: dict[int, Any] = {}

    def heed(number: int, handler: Handler) -> None:
        # Elsewhere signals are somebody else's; one that is ignored, by nohup, stays so.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)

    mode = None
    try:
        for number, handler in {signal.SIGTERM: _end, signal.SIGHUP: _end, **handlers}.items():
            heed(number, handler)
        if terminal is not None:
            mode = _make_raw(terminal)
            heed(signal.SIGCONT, lambda *_: _make_raw(terminal))  # the shell has set its own mode
        yield
    finally:
        if signal.SIGCONT in before:
            signal.signal(signal.SIGCONT, before.pop(signal.SIGCONT))
        if terminal is not None and mode is not None:
            set_mode(terminal, mode)
        for number, old in before.items():
            signal.signal(number, old)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _make_raw(terminal: int) -> list[Any] | None:
    # Its mode before, for ``set_mode``; None: the terminal is gone.
    while True:
        try:
            before = termios.tcgetattr(terminal)
            tty.setraw(terminal, termios.TCSANOW)
            return before
        except termios.error as error:
            if error.args[0] != errno.EINTR:
                return None
