# SPDX-License-Identifier: Apache-2.0
"""The console device (§5.3): /dev/hvc0 of the guest, and further named ports for whatever the host likes.

A port has the shape of the serial port (``feed``, ``wait_output``, ``close``), so that ``vmm.machine.console.Console``
joins either to the terminal.
"""

from __future__ import annotations

import threading
from functools import partial

from virtio import spec
from virtio._worker import Worker
from virtio.device import VirtioDevice
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from virtio.device import ActivateContext
    from vmm._fastpath import Chain

MAX_PORTS = 16
# A guest whose output nobody takes waits, as on a serial line that is held up. What is taken then may be a piece more.
OUTPUT_MAX = 256 << 10
TAKE_MAX = 64 << 10
PIECE = 64 << 10  # of the guest's output that is copied at once
# As on the serial port: how far the host may be ahead of a guest that does not read.
INPUT_MAX = 4 << 10
_NAP = 0.05  # seconds that a held-up worker sleeps before it looks whether it is to stop
_CONTROL_IN, _CONTROL_OUT = 2, 3


class ConsolePort:
    """One port: bytes both ways, each way bounded.

    :ivar name: what the guest finds in /sys/class/virtio-ports/*/name, for a port other than the first
    :ivar guest_open: whether the guest takes input; beside a control queue, whether a program there has it open
    :ivar lost: bytes of output that came after ``close`` or found no room in an emergency
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.guest_open = False
        self.lost = 0
        self._change = threading.Condition()
        self._output = bytearray()
        self._input = bytearray()
        self._closed = False
        self._wake: Callable[[], None] | None = None  # while a driver is there: look at the input

    # For the host

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` to the guest; returns when all of it is taken, at most 4 KiB ahead of the guest.

        Blocks while the guest does not read; ``close`` ends the wait, and what was not taken by then is lost.
        """
        view = memoryview(data).cast("B")
        while view:
            with self._change:
                self._change.wait_for(lambda: self._closed or len(self._input) < INPUT_MAX)
                if self._closed:
                    return
                part = view[: INPUT_MAX - len(self._input)]
                self._input += part
                if self._wake is not None:
                    self._wake()
            view = view[len(part) :]

    def wait_output(self) -> bytes:
        """Take what the guest has sent, waiting until there is something.

        :returns: at most 64 KiB; ``b""`` when the port is closed and everything was taken
        """
        with self._change:
            self._change.wait_for(lambda: self._closed or self._output)
            taken = bytes(self._output[:TAKE_MAX])
            del self._output[:TAKE_MAX]
            self._change.notify_all()
        return taken

    def close(self) -> None:
        """End the waits of ``feed`` and ``wait_output``; what the guest sends from now on is dropped. Idempotent."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    # For the device

    def attach(self, wake: Callable[[], None] | None) -> None:
        """A driver is there, or None: it is gone, and with it whoever had the port open."""
        with self._change:
            self._wake = wake
            self.guest_open = False

    def open(self, is_open: bool) -> None:
        """The guest takes input from now on, or no more; Linux drops what comes to a port that nobody has open."""
        with self._change:
            self.guest_open = is_open
            if self._wake is not None:
                self._wake()

    def has_input(self) -> bool:
        """Whether there is something for the guest, and somebody there to take it."""
        return self.guest_open and bool(self._input)

    def take_input(self, room: int) -> bytes:
        """At most `room` bytes for the guest."""
        with self._change:
            taken = bytes(self._input[:room])
            del self._input[:room]
            self._change.notify_all()
        return taken

    def wait_room(self, context: ActivateContext) -> bool:
        """Wait until there is room for output; False: this thread is to stop first."""
        with self._change:
            while len(self._output) >= OUTPUT_MAX and not (self._closed or context.stopping):
                self._change.wait(_NAP)
            return self._closed or len(self._output) < OUTPUT_MAX

    def put(self, data: bytes, left: int) -> bool:
        """Take the guest's `data` if there is room, without waiting: for a vCPU, too. False: `left` bytes are lost."""
        with self._change:
            room = not self._closed and len(self._output) < OUTPUT_MAX
            if room:
                self._output += data
                self._change.notify_all()
            else:
                self.lost += left
        return room


class Console(VirtioDevice):
    """A virtio console. Its first port is a console, /dev/hvc0; the others are /dev/virtio-ports/NAME.

    :param ports: names of further ports, each of its own
    :param cols: width of the first port's terminal in characters; 0: unknown
    :param rows: height
    :param name: name of the workers' threads
    :raises ConfigError: a name that is empty or there already, too many ports, no such size

    ``ports[0]`` is the console's port, ``ports[1:]`` are those of `ports`, in order.
    """

    thread_kind = "device"
    device_type = spec.TYPE_CONSOLE

    def __init__(
        self, ports: Sequence[str] = (), *, cols: int = 0, rows: int = 0, name: str = "virtio-console"
    ) -> None:
        super().__init__()
        if len(ports) >= MAX_PORTS:
            raise ConfigError("console ports", len(ports), f"must be at most {MAX_PORTS - 1}")
        for port in ports:
            if not 0 < len(port.encode()) <= 255 or ports.count(port) > 1:
                raise ConfigError("console port", port, "must have a unique name of 1 to 255 bytes")
        self.name = name
        self.ports = (ConsolePort(), *map(ConsolePort, ports))
        # MULTIPORT for a single port, too: Linux throws away what comes before it has set its port up, and only a
        # control message tells when it has.
        self.features = spec.CONSOLE_F_SIZE | spec.CONSOLE_F_MULTIPORT | spec.CONSOLE_F_EMERG_WRITE
        self.queue_sizes = (64,) * (2 + 2 * len(self.ports))
        self.config = self._config_space(cols, rows)
        self._multiport = False
        # Control messages for the driver, and the ports that it was told of and has set up.
        self._messages: list[bytes] = []
        self._messages_lock = threading.Lock()
        self._announced = False
        self._ready: set[int] = set()

    def _config_space(self, cols: int, rows: int) -> bytes:
        for field, value in (("cols", cols), ("rows", rows)):
            if not 0 <= value <= 0xFFFF:
                raise ConfigError(f"console {field}", value, "must be 0 to 65535")
        return spec.CONSOLE_CONFIG.pack(cols, rows, len(self.ports), 0)

    def resize(self, cols: int, rows: int) -> None:
        """Tell the driver that the first port's terminal has this size from now on. Any thread.

        :raises ConfigError: an invalid size
        """
        self.publish_config(self._config_space(cols, rows))
        if 0 in self._ready:
            self._send(0, spec.CONSOLE_RESIZE, 0, spec.CONSOLE_SIZE.pack(cols, rows))

    # The driver

    def make_workers(self, notify_fds: Sequence[int], on_failure: Callable[[Exception], None]) -> Sequence[Worker]:
        """One thread for what goes to the guest, and one for each port's output, so that none holds up another."""
        outputs = [index for index in range(len(notify_fds)) if index & 1 and index != _CONTROL_OUT]
        others = [index for index in range(len(notify_fds)) if index not in outputs]
        groups = [others, *([index] for index in outputs)]
        return [Worker(self, group, [notify_fds[index] for index in group], on_failure) for group in groups]

    def activate(self, context: ActivateContext) -> None:
        self._multiport = bool(context.features & spec.CONSOLE_F_MULTIPORT)
        for number, port in enumerate(self.ports if self._multiport else self.ports[:1]):
            port.attach(partial(self.wake, 2 * number + 2 * bool(number)))
        if not self._multiport:
            self.ports[0].open(True)

    def reset(self) -> None:
        """Forget the driver; input that it has not taken waits for the next one."""
        for port in self.ports:
            port.attach(None)
        with self._messages_lock:
            self._multiport = self._announced = False
            self._messages.clear()
            self._ready.clear()

    def save(self) -> dict[str, Any]:
        with self._messages_lock:
            return {
                "announced": self._announced,
                "ready": sorted(self._ready),
                "open": [number for number, port in enumerate(self.ports) if port.guest_open],
                "messages": list(self._messages),
            }

    def restore(self, state: dict[str, Any]) -> None:
        known = range(len(self.ports))
        if not {*state["ready"], *state["open"]} <= {*known}:
            raise ValueError("more ports than there are")
        with self._messages_lock:
            self._announced = bool(state["announced"])
            self._ready = set(state["ready"])
            self._messages = [bytes(memoryview(message)) for message in state["messages"]]
        for number in state["open"]:
            self.ports[number].open(True)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the character of an emergency write (§5.3.5.1), whatever state the device is in."""
        at = spec.CONSOLE_CONFIG_EMERG_WR - offset
        if 0 <= at < len(data):
            self.ports[0].put(data[at : at + 1], 1)

    def process(self, queue_index: int) -> None:
        """Serve one queue (§5.3.2): even ones go to the guest, 2 and 3 are the control queues."""
        queue = self.context.queues[queue_index]
        if queue_index > 1 and not self._multiport:
            return
        port = self.ports[queue_index // 2 if queue_index < 2 else queue_index // 2 - 1]
        if queue_index == _CONTROL_IN:
            self.drain(queue, partial(self._give, self._take_message), lambda: self._messages)
        elif queue_index == _CONTROL_OUT:
            self.drain(queue, self._serve_control)
        elif queue_index & 1:
            # A chain is taken only where there is room: one that is begun must be ended when this thread is to stop.
            self.drain(queue, partial(self._serve_output, port), partial(port.wait_room, self.context))
        else:
            self.drain(queue, partial(self._give, port.take_input), port.has_input)

    def _serve_output(self, port: ConsolePort, chain: Chain) -> int:
        self.counters["requests"] += 1
        if chain.writable_bytes:  # §5.3.6.1: the driver must not
            self.counters["bad_requests"] += 1
            return 0
        done = 0
        while part := chain.gather(PIECE, done):
            port.wait_room(self.context)
            if not port.put(part, chain.readable_bytes - done):
                break  # nobody takes the rest of gigabytes either
            done += len(part)
        return 0

    def _give(self, take: Callable[[int], bytes], chain: Chain) -> int:
        self.counters["requests"] += 1
        data = b"" if chain.readable_bytes else take(chain.writable_bytes)
        if not data:  # readable, empty, or too small for a message
            self.counters["bad_requests"] += 1
        return chain.scatter(data)

    # Control messages, §5.3.6.2

    def _send(self, port: int, event: int, value: int, more: bytes = b"") -> None:
        message = spec.CONSOLE_CONTROL.pack(port, event, value) + more
        with self._messages_lock:
            if not self._multiport:
                return
            if event == spec.CONSOLE_RESIZE:  # the last one is enough
                self._messages = [m for m in self._messages if m[4:6] != message[4:6]]
            self._messages.append(message)
            self.wake(_CONTROL_IN)

    def _take_message(self, room: int) -> bytes:
        with self._messages_lock:
            fits = self._messages and len(self._messages[0]) <= room
            return self._messages.pop(0) if fits else b""

    def _serve_control(self, chain: Chain) -> int:
        self.counters["requests"] += 1
        head = chain.gather(spec.CONSOLE_CONTROL.size)
        if chain.writable_bytes or len(head) < spec.CONSOLE_CONTROL.size or not self._obey(head):
            self.counters["bad_requests"] += 1
        return 0

    def _obey(self, message: bytes) -> bool:
        """Do what the driver says; False: it may not say that, or not now, and nothing is sent for it."""
        number, event, value = spec.CONSOLE_CONTROL.unpack(message)
        if event == spec.CONSOLE_DEVICE_READY and not self._announced:
            self._announced = value == 1
            for other in range(len(self.ports) if self._announced else 0):
                self._send(other, spec.CONSOLE_DEVICE_ADD, 0)
            return True
        if not self._announced or number >= len(self.ports):
            return False
        port = self.ports[number]
        if event == spec.CONSOLE_PORT_READY and number not in self._ready:
            if value == 1:
                self._ready.add(number)
                self._introduce(number, port)
            return True
        if event == spec.CONSOLE_PORT_OPEN and number in self._ready:
            port.open(value == 1)
            return True
        return False

    def _introduce(self, number: int, port: ConsolePort) -> None:
        if number == 0:
            cols, rows, _, _ = spec.CONSOLE_CONFIG.unpack(self.config)
            self._send(0, spec.CONSOLE_CONSOLE_PORT, 1)
            self._send(0, spec.CONSOLE_RESIZE, 0, spec.CONSOLE_SIZE.pack(cols, rows))
        else:
            self._send(number, spec.CONSOLE_PORT_NAME, 1, port.name.encode())
        self._send(number, spec.CONSOLE_PORT_OPEN, 1)
