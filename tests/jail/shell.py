# SPDX-License-Identifier: Apache-2.0
"""A shell with job control, of one job: ``shell.py fg|bg|nohup|stay COMMAND ...``, with a terminal as its stdin.

It ends with the job's status, or never (``stay``). A job in the background that stops at its terminal is said so, and
brought to the front. SIGUSR1 takes the terminal from the job, SIGUSR2 gives it back.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios


def main(how: str, command: list[str]) -> int:
    """Run the job."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        if how != "bg":
            os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        if how == "nohup":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execvp(command[0], command)
    if how == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it lives on to tell the job's status

    def give(number: int, frame: object) -> None:
        os.tcsetpgrp(0, os.getpgrp() if number == signal.SIGUSR1 else pid)
        os.killpg(pid, signal.SIGCONT)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, give)
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            if how == "stay":
                os.tcsetpgrp(0, os.getpgrp())
                signal.pause()
            return os.waitstatus_to_exitcode(status) & 0xFF
        os.write(1, b"stopped\r\n")
        os.tcsetpgrp(0, pid)
        os.killpg(pid, signal.SIGCONT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
