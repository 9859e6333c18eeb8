# SPDX-License-Identifier: Apache-2.0
"""The host's side of the serial console: this terminal, a file, a unix socket, or nothing.

One thread takes the guest's output, if there is a reader, and one passes on the input. A terminal or a guest that does
not read blocks only its own thread. On a terminal, a third thread waits for the guest to read, so that the escape key
always works. In the mode ``raw`` and with a FIFO, output that nobody reads is lost, because it would block the guest.

A 16550A has no way to tell the guest how large the window is: SIGWINCH does nothing here. In the guest,
``resize`` or ``stty rows R cols C`` does.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time

from vmm import logger
from vmm.errors import ConfigError
from vmm.threads import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from queue import SimpleQueue
    from typing import Any, Protocol

    from devices._serial import Serial
    from vmm.machine.console_socket import ConsoleSocket

    class Port(Protocol):
        """What a console needs of a serial port."""

        def feed(self, data: bytes) -> None: ...
        def wait_output(self) -> bytes: ...
        def close(self) -> None: ...


ESCAPE = 0x01  # Ctrl-A, as in QEMU
INTERRUPT = 0x03  # Ctrl-C
# Two Ctrl-C with nothing between them and no longer apart than this end the VM; one alone is the guest's.
INTERRUPT_SECONDS = 1.0
# How long an end of the VM waits for whoever reads our output.
DRAIN_SECONDS = 5.0
# How long a reader who kept up so far may take a rest before output is lost.
PATIENCE_MS = 100
# How long we look away from a terminal that another job has.
BACKGROUND_SECONDS = 0.5
LIMITED_PIECE = 256  # bytes of output that pass a rate limit together
PANIC = b"Kernel panic - not syncing"
HELP = "press Ctrl-A x to quit, Ctrl-C twice to end the VM, Ctrl-A Ctrl-A for Ctrl-A itself"


class Console:
    """Joins a serial port to the host.

    :param serial: the port; ``close`` closes it
    :param mode: ``"stdio"``; ``"raw"``, the same without keys of our own; ``"file:PATH"`` (a FIFO, or a file, created
        for its owner alone, or emptied); ``"unix:PATH"`` (see ``vmm.machine.console_socket``); or ``"none"``
    :param limit: called with a number of bytes, it says whether they have to wait: those are lost; None: no limit
    :param on_quit: called when the person at the terminal asks for the end, on a thread of the console's;
        again where they ask again
    :raises ConfigError: the file cannot be written, or the socket cannot be made

    ``lost`` is how many bytes of output could not be written, or were too many.
    """

    def __init__(
        self,
        serial: Port,
        *,
        mode: str = "stdio",
        on_quit: Callable[[], None] = lambda: None,
        limit: Callable[[int], int] | None = None,
    ) -> None:
        self._serial = serial
        self._on_quit = on_quit
        self._limit = limit
        self._own_keys = mode == "stdio"
        self._lossy = mode == "raw"
        self._patience_ms = PATIENCE_MS
        self._out: int | None = None
        self._in: int | None = None
        self._owned: int | None = None
        self._socket: ConsoleSocket | None = None
        self._saved: list[Any] | None = None
        self._closed = False
        self._wake: int | None = None
        self._typed: SimpleQueue[bytes] | None = None  # on a terminal: keys that the guest has not taken
        self._writer: threading.Thread | None = None
        self._readers: list[threading.Thread] = []
        self._write_error = ""
        self._tail = b""
        self._pressed = 0  # the key before: Ctrl-A opens an escape, Ctrl-C may be the first of two
        self._pressed_at = 0.0
        self._output_lock = threading.Lock()  # around the three that follow
        self._listeners: list[Callable[[bytes], object]] = []
        self._quiet: Serial | None = None  # the port, while nobody takes its output
        self._native: Serial | None = None  # the port, where it writes its output itself
        self._kind: str | None = None
        self._panic_seen = False
        self.lost = 0
        if mode in ("stdio", "raw"):
            self._out, self._in = 1, 0
            if mode == "raw" and _of_another_job(0, unknown=True):
                self._in = None  # to touch it would stop us (SIGTTIN, SIGTTOU)
        elif mode.startswith("file:"):
            path = mode.removeprefix("file:")
            try:
                self._lossy = os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)
                # A FIFO for reading, too, or its opening would wait for a reader, and its last reader take us along.
                flags = os.O_RDWR | os.O_NONBLOCK if self._lossy else os.O_WRONLY | os.O_CREAT
                self._owned = os.open(path, flags | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise ConfigError("--console", mode, f"cannot be written: {why}") from None
            self._out = self._owned
        elif mode.startswith("unix:"):
            from vmm.machine.console_socket import ConsoleSocket

            self._socket = ConsoleSocket(mode.removeprefix("unix:"), serial.feed)

    def start(self, kind: str | None = "console", *, native: Serial | None = None) -> None:
        """Empty the file, make the terminal raw if stdin is one, and let the bytes flow.

        :param kind: kind of its threads; see ``vmm.threads.spawn``
        :param native: the port, if it is one in C. Output that goes nowhere is lost there until ``listen`` is called
        """
        if self._owned is not None:
            try:
                os.ftruncate(self._owned, 0)
            except OSError:
                pass  # a FIFO or a device, which has nothing to empty
        if self._in is not None and os.isatty(self._in):
            self.enter_raw_mode()
            if self._own_keys:
                from _queue import SimpleQueue  # `queue` itself imports more

                logger.tell(HELP)
                self._typed = SimpleQueue()
                self._readers.append(spawn(kind, "console keys", self._pump_typed))
        with self._output_lock:
            self._kind = kind
            unheard = not self._listeners and self._out is None and self._socket is None and self._limit is None
            if native is not None and unheard:
                native.drop_output(PANIC)
                self._quiet = native
            else:
                if self._limit is None and self._socket is None:
                    self._native = native
                self._writer = spawn(kind, "console out", self._pump_output)
        if self._in is not None:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            self._readers.append(spawn(kind, "console in", self._pump_input))
        if self._socket is not None:
            self._socket.start(kind)

    # Output

    @property
    def panic_seen(self) -> bool:
        """Whether Linux's last words of a panic went by."""
        return self._panic_seen or (self._quiet is not None and self._quiet.said)

    def listen(self, callback: Callable[[bytes], object]) -> None:
        """Call `callback` with the output as it comes, on the console's thread; before ``start``, or from here on.

        One that raises is reported and not called again.
        """
        with self._output_lock:
            self._listeners.append(callback)
            if self._quiet is not None and self._writer is None and not self._closed:
                self._quiet.keep_output()
                self._writer = spawn(self._kind, "console out", self._pump_output)

    def _pump_output(self) -> None:
        while taken := self._take_output():
            data, written = taken
            window = self._tail + data
            self._panic_seen = self._panic_seen or PANIC in window
            self._tail = window[-len(PANIC) :]
            self._write(data[written:] if self._limit is None else self._limited(data))
            for callback in tuple(self._listeners):
                try:
                    callback(data)
                except Exception:
                    # The guest would stop at a full ring if this thread ended.
                    self._listeners.remove(callback)
                    sys.excepthook(*sys.exc_info())

    def _take_output(self) -> tuple[bytes, int] | None:
        # With how many bytes are written already; None: the end.
        if self._native is not None and self._out is not None:
            data, written = self._native.write_output(self._out, not self._lossy)
            if written:
                self._patience_ms = PATIENCE_MS
        else:
            data, written = self._serial.wait_output(), 0
        return (data, written) if data else None

    def _limited(self, data: bytes) -> bytes:
        assert self._limit is not None
        kept = []
        for at in range(0, len(data), LIMITED_PIECE):
            piece = data[at : at + LIMITED_PIECE]
            if self._limit(len(piece)):
                self.lost += len(piece)
            else:
                kept.append(piece)
        return b"".join(kept)

    def _write(self, data: bytes) -> None:
        if self._socket is not None:
            self.lost += self._socket.put(data)
            return
        view = memoryview(data)
        while view and self._out is not None:
            try:
                if self._lossy and not self._taken():
                    break
                view = view[os.write(self._out, view[: logger.PIPE_BUF] if self._lossy else view) :]
            except BlockingIOError:
                if self._lossy:
                    break
                # Somebody made our stdout non-blocking, as a shell's other jobs may.
                logger.is_writable(self._out, None)
            except OSError as error:
                # A broken pipe, a full disk, a terminal that is gone: the guest runs on without us.
                self._out = None
                self._write_error = error.strerror or str(error)
        if self._out is not None or self._write_error:
            self.lost += len(view)

    def _taken(self) -> bool:
        # Whether there is room for PIPE_BUF bytes; a reader who was too slow once gets no time again until he is not.
        assert self._out is not None
        room = logger.is_writable(self._out, self._patience_ms)
        self._patience_ms = PATIENCE_MS if room else 0
        return room

    # Input

    def _pump_input(self) -> None:
        import select

        assert self._in is not None and self._wake is not None
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        awake = select.poll()  # select(2) takes no descriptor above 1023
        awake.register(self._wake, select.POLLIN)
        while not any(fd == self._wake for fd, _ in poll.poll()):
            try:
                data = os.read(self._in, 4096)
            except BlockingIOError:
                continue
            except OSError as error:
                # This thread blocks SIGTTIN, so a read in the background fails instead of stopping us.
                if error.errno != errno.EIO or not os.isatty(self._in):
                    return  # the terminal is gone
                awake.poll(BACKGROUND_SECONDS * 1000)
                continue
            if not data:
                return  # end of the input; the guest runs on
            if self._typed is None:
                self._serial.feed(data)
            elif data := self._keys(data):
                self._typed.put(data)

    def _pump_typed(self) -> None:
        # What is pasted waits in memory, not in the terminal, where it would stand before our own keys.
        assert self._typed is not None
        while data := self._typed.get():
            self._serial.feed(data)

    def _keys(self, data: bytes) -> bytes:
        # What is left for the guest after our own keys.
        kept = bytearray()
        for key in data:
            before, self._pressed = self._pressed, key
            if before == ESCAPE and key != INTERRUPT:
                self._pressed = 0
                if key in b"xX":
                    self._on_quit()
                elif key == ESCAPE:
                    kept.append(ESCAPE)
                else:
                    logger.tell(HELP)
                continue
            if key == ESCAPE:
                continue
            if key == INTERRUPT:
                now = time.monotonic()
                if before == INTERRUPT and now - self._pressed_at < INTERRUPT_SECONDS:
                    self._on_quit()
                self._pressed_at = now
            kept.append(key)
        return bytes(kept)

    # The terminal

    def enter_raw_mode(self) -> None:
        """Give every key to the guest; a background job is stopped by this, as its shell wants it."""
        if self._closed or self._in is None or not os.isatty(self._in):
            return
        import atexit
        import termios

        try:
            mode = termios.tcgetattr(self._in)
        except termios.error:
            return  # the terminal is gone
        if self._saved is None:
            self._saved = [*mode[:6], list(mode[6])]
            atexit.register(self.restore_terminal)  # for a program that ends without close()
        mode[0] &= ~(termios.BRKINT | termios.INLCR | termios.IGNCR | termios.ICRNL)
        mode[0] &= ~(termios.INPCK | termios.ISTRIP | termios.IXON)
        # OPOST stays: our own messages, and those of programs that share the terminal, still end their lines.
        mode[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        set_mode(self._in, mode)

    def continued(self) -> None:
        """After a SIGCONT: in the foreground, where the shell has set its own mode, enter raw mode again."""
        if self._in is not None and not _of_another_job(self._in):
            self.enter_raw_mode()

    def restore_terminal(self) -> None:
        """Put the terminal back as it was; idempotent, and safe in a signal handler."""
        if self._saved is None or self._in is None:
            return
        saved, self._saved = self._saved, None
        if not _of_another_job(self._in):  # which has set its own mode
            set_mode(self._in, saved)

    def close(self) -> None:
        """Restore the terminal, and write out what the guest has sent, for 5 seconds at most; idempotent."""
        with self._output_lock:
            if self._closed:
                return
            self._closed = True
        self._serial.close()
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)
        if self._typed is not None:
            self._typed.put(b"")
        read_on = [thread for thread in self._readers if not _ended(thread, 1.0)]
        # Before the wait for our output's reader: from here Ctrl-C is a signal again.
        self.restore_terminal()
        if self._writer is not None and not _ended(self._writer, DRAIN_SECONDS):
            if self._writer is not threading.current_thread():
                logger.warn("nobody takes the console's output; the rest of it is lost")
        else:
            if self.lost and self._socket is None:
                why = self._write_error or "nobody took them"
                logger.warn(f"{self.lost} bytes of the console's output are lost: {why}")
            if self._owned is not None:
                try:
                    os.close(self._owned)
                except OSError as error:  # a network's or FUSE's file system says only now what it could not store
                    logger.warn(f"some of the console's output may be lost: {error.strerror}")
        if self._socket is not None:
            self._socket.close(DRAIN_SECONDS)
        # A thread that is still there keeps its descriptors until the process ends.
        if self._wake is not None and not read_on:
            os.close(self._wake)
        self._wake = self._owned = None


def _ended(thread: threading.Thread, seconds: float) -> bool:
    if thread is threading.current_thread():
        return False
    thread.join(seconds)
    return not thread.is_alive()


def _of_another_job(fd: int, *, unknown: bool = False) -> bool:
    # `unknown` is the answer where both process groups are outside of our pid namespace.
    try:
        owner = os.tcgetpgrp(fd) if os.isatty(fd) else None
    except OSError:
        return False  # a terminal, but not ours to control
    return owner is not None and (owner != os.getpgrp() or (owner == 0 and unknown))


def set_mode(fd: int, mode: list[Any]) -> None:
    """Set a terminal's mode, as ``termios.tcgetattr`` gives it; nothing where the terminal is gone."""
    import termios

    while True:
        try:
            # Not TCSADRAIN: a terminal whose output is stopped must not hold us.
            termios.tcsetattr(fd, termios.TCSANOW, mode)
            return
        except termios.error as error:
            if error.args[0] != errno.EINTR:
                return  # the terminal is gone, or an orphaned job's
