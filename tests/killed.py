# SPDX-License-Identifier: Apache-2.0
"""A function in a process of its own that is killed when it begins its n-th system call: ptrace(2)."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_TRACESYSGOOD, _EXITKILL = 1, 0x10_0000
_STOPPED = signal.SIGTRAP | 0x80  # what TRACESYSGOOD makes of a system call's begin and end
_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long] * 4
_ptrace.restype = ctypes.c_long


def _ask(request: int, pid: int, data: int = 0) -> None:
    if _ptrace(request, pid, 0, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def killed_at(step: int, function: Callable[[], object]) -> bool:
    """Run `function` in a child of this process that is killed as it begins its system call `step`, from 1 on.

    :returns: whether it was; False: it had ended, and all was well
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            _ask(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.waitpid(child, 0)
    _ask(_SETOPTIONS, child, _TRACESYSGOOD | _EXITKILL)
    begins, inside = 0, False
    while True:
        _ask(_SYSCALL, child)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            assert os.waitstatus_to_exitcode(status) == 0, "it failed by itself"
            return False
        if os.WSTOPSIG(status) != _STOPPED:
            continue
        inside = not inside
        begins += inside
        if begins == step:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
