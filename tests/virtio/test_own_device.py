# SPDX-License-Identifier: Apache-2.0
"""What the author of a device meets: mistakes in what it declares and does, and the thread that serves it."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator
from typing import Any

import pytest

from virtio._worker import Worker
from virtio.device import VirtioDevice, check
from virtio.testing import Allocator, DeviceHost
from vmm.errors import ConfigError
from vmm.memory import GuestMemory


class Sender(VirtioDevice):
    """Fills the driver's buffers with what waits."""

    name = "sender"
    device_type = 63
    queue_sizes: Any = (8,)

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[bytes] = []

    def process(self, queue_index: int) -> None:
        self.drain(self.context.queues[queue_index], self.serve, lambda: self.waiting)

    def serve(self, chain: Any) -> int:
        sent: int = chain.scatter(self.waiting.pop(0))
        return sent


@pytest.fixture
def host() -> Iterator[DeviceHost[Sender]]:
    host = DeviceHost(Sender(), GuestMemory(1 << 20), Allocator(0x1000, 0x10000))
    yield host
    host.close()


def test_buffers_stay_in_the_queue_until_there_is_something(host: DeviceHost[Sender]) -> None:
    host.device.wake(0)  # no driver yet
    host.driver.bring_up()
    ring = host.driver.queues[0]
    buffers = [host.room(4), host.room(4)]
    heads = [ring.add([buffer]) for buffer in buffers]
    host.driver.kick()
    for data, head, buffer in zip((b"one", b"four"), heads, buffers, strict=True):
        ring.want_interrupt()
        host.device.waiting.append(data)
        host.device.wake(0)
        assert host.reap(0, head) == len(data)
        assert host.ram.read(buffer.addr, len(data)) == data
    host.device.waiting.append(b"five")  # the other way round
    host.device.wake(0)
    assert host.submit(0, [buffers[0]]) == 4


def test_wake_after_the_machine_is_gone_writes_to_nobodys_descriptor(host: DeviceHost[Sender]) -> None:
    host.driver.bring_up()
    host.close()
    host.device.wake(0)
    assert host.device.notify_fds == []


def test_a_device_that_stops_ends_the_wait_with_its_reason(host: DeviceHost[Sender]) -> None:
    def fail(chain: object) -> int:
        raise KeyError("mine")

    host.device.serve = fail  # type: ignore[method-assign]
    host.device.waiting.append(b"")
    host.driver.bring_up()
    where = f"test_own_device.py:{fail.__code__.co_firstlineno + 1}"
    with pytest.raises(AssertionError, match=rf"^sender stopped .*: KeyError: 'mine' \({where}\)"):
        host.submit(0, [host.room(4)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queue_sizes": (8, 7)}, r"Wrong.queue_sizes \(8, 7\): must be a tuple of powers of two up to 32768, one "),
        ({"queue_sizes": [8]}, r"Wrong.queue_sizes \[8\]: must be a tuple"),
        ({"queue_sizes": ()}, r"Wrong.queue_sizes \(\): must be a tuple"),
        ({"queue_sizes": (8,) * 65}, r"Wrong.queue_sizes \(8.*: must be a tuple .*, one for each of 1 to 64 queues"),
        ({"device_type": "rng"}, "Wrong.device_type 'rng': must be a number"),
        ({"device_type": 0}, "Wrong.device_type 0: must be a number"),
        ({"features": 1 << 34}, "Wrong.features 17179869184: must have no bits but 0 to 23 and 50 to 63"),
        ({"config": "abc"}, "Wrong.config 'abc': must be bytes, 3840 at most"),
        ({"config": bytes(3841)}, "Wrong.config .*: must be bytes, 3840 at most"),
        ({"name": ""}, "Wrong.name '': must be a string"),
        ({"__init__": lambda self: None}, r"device Wrong: its __init__ must call super\(\).__init__\(\) first"),
    ],
)
def test_what_is_declared_wrongly_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check(type("Wrong", (Sender,), changes)())


def test_what_is_not_declared_is_named() -> None:
    class Wrong(VirtioDevice):
        queue_sizes = (8,)

    with pytest.raises(ConfigError, match=r"^Wrong.device_type: is missing: must be a number, such as those of §5$"):
        check(Wrong())


@pytest.mark.parametrize(("device", "what"), [(object(), "object"), (Sender, "class Sender")])
def test_what_is_no_device_is_named(device: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=f"^device {what}: must be an object of a class that is derived from Virtio"):
        check(device)


def test_a_descriptor_that_epoll_refuses_is_refused_with_its_reason(host: DeviceHost[Sender]) -> None:
    with contextlib.ExitStack() as stack:
        fd = host.irq.fd
        for _ in range(5):
            outer = stack.enter_context(select.epoll())
            outer.register(fd)
            fd = outer.fileno()
        with pytest.raises(OSError, match="Too many levels"):
            Worker(host.device, [0], [fd], print)


def test_a_device_is_in_one_place_at_a_time(host: DeviceHost[Sender]) -> None:
    with pytest.raises(ConfigError, match=r"^device sender: is in a machine; make another"):
        DeviceHost(host.device, host.ram, Allocator(0x20000, 0x10000))
    host.close()
    DeviceHost(host.device, host.ram, Allocator(0x20000, 0x10000)).close()
