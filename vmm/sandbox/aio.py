# SPDX-License-Identifier: Apache-2.0
"""The same for asyncio: each call waits on a thread of its own, so that none holds up the loop or another call."""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import Future

from vmm import threads
from vmm.sandbox.channel import Deadline
from vmm.sandbox.files import Files, Watch
from vmm.sandbox.process import DEFAULT_LIMIT, Process
from vmm.sandbox.sandbox import Sandbox
from vmm.sandbox.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from typing import Any, Concatenate, ParamSpec, TypeVar

    from vmm.sandbox.e2b.aio import AsyncCommands
    from vmm.sandbox.files import Change
    from vmm.sandbox.process import Result

    P = ParamSpec("P")
    R = TypeVar("R")
    S = TypeVar("S")


async def in_thread(
    work: Callable[[], R], *, cancel: Callable[[], object] = lambda: None, undo: Callable[[R], object] | None = None
) -> R:
    """What `work` returns, on a thread of its own.

    :param cancel: ends the work when the task is cancelled
    :param undo: gets a result that nobody waits for any more
    """
    loop, ended, given_up = asyncio.get_running_loop(), asyncio.Event(), False
    done: Future[R] = Future()

    def drop() -> None:
        if undo is not None and done.exception() is None:  # which waits for the end
            undo(done.result())

    def body() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        try:
            loop.call_soon_threadsafe(ended.set)
        except RuntimeError:  # the loop is closed
            if not given_up:
                drop()

    threads.spawn(None, "sandbox call", body)
    try:
        await ended.wait()
    except asyncio.CancelledError:
        given_up = True
        cancel()
        threads.spawn(None, "sandbox call", drop)
        raise
    return done.result()


def twin(
    method: Callable[Concatenate[S, P], R], *, undo: Callable[[R], object] | None = None
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """The method of ``self.sync``, awaited; `undo` is that of ``in_thread``."""

    @functools.wraps(method)
    async def call(self: Any, /, *args: P.args, **settings: P.kwargs) -> R:
        return await in_thread(lambda: method(self.sync, *args, **settings), undo=undo)

    return call


async def each(things: Iterator[R], *, cancel: Callable[[], object] = lambda: None) -> AsyncIterator[R]:
    """Each of `things`, none of which is None, as it comes; `cancel` is that of ``in_thread``."""
    while (thing := await in_thread(lambda: next(things, None), cancel=cancel)) is not None:
        yield thing


class AsyncFiles:
    """Files of a sandbox, as :class:`vmm.sandbox.Files`.

    :ivar sync: that object
    """

    def __init__(self, sync: Files) -> None:
        self.sync = sync

    read = twin(Files.read)
    read_bytes = twin(Files.read_bytes)
    write = twin(Files.write)
    list = twin(Files.list)
    stat = twin(Files.stat)
    get_info = twin(Files.stat)
    exists = twin(Files.exists)
    make_dir = twin(Files.make_dir)
    remove = twin(Files.remove)
    rename = twin(Files.rename)
    symlink = twin(Files.symlink)
    chmod = twin(Files.chmod)
    chown = twin(Files.chown)
    copy_in = twin(Files.copy_in)
    copy_out = twin(Files.copy_out)
    put_archive = twin(Files.put_archive)

    async def watch(self, path: str, **settings: Any) -> AsyncWatch:
        """As :meth:`vmm.sandbox.Files.watch`."""
        return AsyncWatch(await in_thread(lambda: self.sync.watch(path, **settings), undo=Watch.close))

    def stream(self, path: str, **settings: Any) -> AsyncIterator[bytes]:
        """As :meth:`vmm.sandbox.Files.stream`."""
        return each(self.sync.stream(path, **settings))

    def get_archive(self, path: str, **settings: Any) -> AsyncIterator[bytes]:
        """As :meth:`vmm.sandbox.Files.get_archive`."""
        return each(self.sync.get_archive(path, **settings))


class AsyncWatch:
    """Changes in a directory, as :class:`vmm.sandbox.files.Watch`; an async iterator.

    :ivar sync: that object
    """

    def __init__(self, sync: Watch) -> None:
        self.sync = sync

    def __aiter__(self) -> AsyncIterator[Change]:
        return each(self.sync, cancel=self.close)

    def close(self) -> None:
        """Watch no more. Idempotent."""
        self.sync.close()


class AsyncProcess:
    """A command that runs, as :class:`vmm.sandbox.Process`; an async context manager. Iteration is by line of output.

    :ivar sync: that object
    """

    def __init__(self, sync: Process) -> None:
        self.sync = sync

    send_signal = twin(Process.send_signal)
    terminate = twin(Process.terminate)
    kill = twin(Process.kill)
    stop = twin(Process.stop)
    resize = twin(Process.resize)

    @property
    def pid(self) -> int:
        """Of the guest's."""
        return self.sync.pid

    async def write(self, data: bytes | str) -> None:
        """Give its standard input all of `data`."""
        await in_thread(lambda: self.sync.stdin.write(data), cancel=self.sync.channel.cut)

    async def close_stdin(self) -> None:
        """Close the command's standard input."""
        await in_thread(self.sync.stdin.close)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await in_thread(self.sync.stdout.readline, cancel=self.sync.channel.cut):
            yield line

    async def communicate(self, input: bytes | str | None = None, timeout: float | None = None) -> Result:
        """As :meth:`vmm.sandbox.Process.communicate`; a task that is cancelled kills the command."""
        return await in_thread(lambda: self.sync.communicate(input, timeout), cancel=self.sync.channel.cut)

    async def wait(self, timeout: float | None = None) -> Result:
        """As :meth:`vmm.sandbox.Process.wait`; a task that is cancelled kills the command."""
        return await in_thread(lambda: self.sync.wait(timeout), cancel=self.sync.channel.cut)

    def close(self) -> None:
        """Give it up: one that still runs is killed. Idempotent."""
        self.sync.close()

    async def __aenter__(self) -> AsyncProcess:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncSandbox:
    """A sandbox for asyncio, as :class:`vmm.sandbox.Sandbox`; an async context manager.

    ``async with AsyncSandbox("debian") as sandbox``, or ``sandbox = await AsyncSandbox.create("debian")``.

    :ivar sync: that object, once it is up
    """

    sync: Sandbox

    def __init__(self, image: Any = "debian", **settings: Any) -> None:
        self._make = functools.partial(Sandbox, image, **settings)

    @classmethod
    async def create(cls, image: Any = "debian", **settings: Any) -> AsyncSandbox:
        """One that is up; parameters are those of ``Sandbox``."""
        return await cls(image, **settings).__aenter__()

    @classmethod
    def of(cls, sync: Sandbox) -> AsyncSandbox:
        """The same sandbox, for asyncio."""
        self = cls.__new__(cls)
        self.sync = sync
        self.files = AsyncFiles(sync.files)
        return self

    @classmethod
    async def restore(cls, directory: str, **settings: Any) -> AsyncSandbox:
        """As :meth:`vmm.sandbox.Sandbox.restore`."""
        work = functools.partial(Sandbox.restore, directory, **settings)
        return cls.of(await in_thread(work, undo=Sandbox.close))

    async def exec(self, command: Any, **settings: Any) -> AsyncProcess:
        """Start a command; parameters are those of ``Sandbox.exec``."""
        work = functools.partial(Session.exec, self.sync, command, **settings)
        return AsyncProcess(await in_thread(work, undo=Process.close))

    async def run(
        self, command: Any, *, input: bytes | str | None = None, timeout: float | None = 60, check: bool = False,
        **settings: Any,
    ) -> Result:  # fmt: skip
        """Run a command to its end, as ``Sandbox.run``; a task that is cancelled kills it."""
        limit, deadline = settings.pop("limit", DEFAULT_LIMIT), Deadline(timeout)
        work = functools.partial(
            Process, self.sync._link, self.sync._about, command, limit, deadline, input=input is not None, quiet=True,
            **settings,
        )  # fmt: skip
        with await in_thread(work, undo=Process.close) as process:
            result = await in_thread(lambda: process.communicate_until(deadline, input), cancel=process.channel.cut)
        return result.check() if check else result

    connect = twin(Session.connect, undo=lambda stream: stream.close())
    publish = twin(Session.publish, undo=lambda port: port.close())
    provide = twin(Session.provide, undo=lambda port: port.close())
    pause = twin(Sandbox.pause)
    resume = twin(Sandbox.resume)
    set_timeout = twin(Sandbox.set_timeout)
    snapshot = twin(Sandbox.snapshot)
    make_read_only = twin(Sandbox.make_read_only)
    close = twin(Sandbox.close)
    kill = close

    @functools.cached_property
    def commands(self) -> AsyncCommands:
        """The same by E2B's names."""
        from vmm.sandbox.e2b.aio import AsyncCommands

        return AsyncCommands(self.sync.commands)

    @property
    def network_counters(self) -> dict[str, int]:
        """As :attr:`vmm.sandbox.Sandbox.network_counters`."""
        return self.sync.network_counters

    @property
    def name(self) -> str:
        """As :attr:`vmm.sandbox.Sandbox.name`."""
        return self.sync.name

    @property
    def running(self) -> bool:
        """As :attr:`vmm.sandbox.Sandbox.running`."""
        return self.sync.running

    @property
    def why(self) -> str:
        """As :attr:`vmm.sandbox.Sandbox.why`."""
        return self.sync.why

    @property
    def time_left(self) -> float | None:
        """As :attr:`vmm.sandbox.Sandbox.time_left`."""
        return self.sync.time_left

    @property
    def console(self) -> str:
        """As :attr:`vmm.sandbox.Sandbox.console`."""
        return self.sync.console

    @property
    def program(self) -> list[str]:
        """As :attr:`vmm.sandbox.Sandbox.program`."""
        return self.sync.program

    @property
    def entrypoint(self) -> list[str]:
        """As :attr:`vmm.sandbox.Sandbox.entrypoint`."""
        return self.sync.entrypoint

    async def fork(self, count: int = 1, *, timeout: float | None = None) -> list[AsyncSandbox]:
        """As :meth:`vmm.sandbox.Sandbox.fork`."""

        def undo(copies: list[Sandbox]) -> None:
            for copy in copies:
                copy.close()

        return [
            AsyncSandbox.of(copy) for copy in await in_thread(lambda: self.sync.fork(count, timeout=timeout), undo=undo)
        ]

    async def __aenter__(self) -> AsyncSandbox:
        if "sync" not in self.__dict__:  # else `create`, `fork` or `restore` made it
            self.sync = await in_thread(self._make, undo=Sandbox.close)
            self.files = AsyncFiles(self.sync.files)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self.close())
