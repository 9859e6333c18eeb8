# SPDX-License-Identifier: Apache-2.0
"""The same for asyncio, by E2B's names."""

from __future__ import annotations

import asyncio
import functools
import inspect

from vmm.sandbox.aio import each, in_thread, twin
from vmm.sandbox.e2b.commands import CommandHandle, Commands, Pty
from vmm.sandbox.e2b.errors import NotFoundException, translated
from vmm.sandbox.e2b.files import Filesystem, WatchHandle, refuse_watch
from vmm.sandbox.e2b.sandbox import Paginator, Sandbox, SandboxInfo, _Both
from vmm.sandbox.files import Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from vmm.sandbox.e2b.commands import CommandResult, PtySize


def _on_the_loop(callback: Callable[[Any], Any] | None) -> Callable[[Any], None] | None:
    # A callback, which may be a coroutine function, for a thread to call; it waits for its end.
    if callback is None:
        return None
    loop = asyncio.get_running_loop()

    async def call(said: Any) -> None:
        result = callback(said)
        if inspect.isawaitable(result):
            await result

    return lambda said: asyncio.run_coroutine_threadsafe(call(said), loop).result()


class AsyncCommandHandle:
    """A command that runs, as :class:`CommandHandle`. Its output is read from its start on.

    :ivar sync: that object
    """

    def __init__(self, sync: CommandHandle, **heard: Callable[[Any], object] | None) -> None:
        self.sync = sync
        self._result: CommandResult | None = None
        hears = {name: _on_the_loop(callback) for name, callback in heard.items()}
        self._wait = asyncio.ensure_future(in_thread(lambda: sync.wait(**hears), cancel=sync._process.channel.cut))
        self._wait.add_done_callback(lambda task: task.cancelled() or task.exception())  # it is told by `wait`

    @property
    def pid(self) -> int:
        """Of the guest's."""
        return self.sync.pid

    @property
    def stdout(self) -> str:
        """What it has written so far, as text."""
        return bytes(self.sync._process.stdout._bytes).decode(errors="replace")

    @property
    def stderr(self) -> str:
        """Likewise."""
        return bytes(self.sync._process.stderr._bytes).decode(errors="replace")

    @property
    def exit_code(self) -> int | None:
        """Its status; None: it runs."""
        return self.sync._process._result.exit_code if self.sync._process.ended else None

    @property
    def error(self) -> str | None:
        """How it ended, in words; None: it runs, or its status is 0."""
        return self.sync._process._result.cause if self.exit_code else None

    async def wait(self) -> CommandResult:
        """As :meth:`CommandHandle.wait`; a task that is cancelled kills what does not run in the background."""
        return await self._wait

    kill = twin(CommandHandle.kill)
    send_stdin = twin(CommandHandle.send_stdin)
    close_stdin = twin(CommandHandle.close_stdin)

    async def disconnect(self) -> None:
        """Listen to it no more; it goes on."""
        self._wait.cancel()
        self.sync.disconnect()


class _AsyncRunning:
    sync: Any

    async def connect(self, pid: int, timeout: float | None = 60, request_timeout: float | None = None) -> Any:
        """The handle of a command that was started here in the background.

        :raises NotFoundException: no command has this pid
        """
        try:
            return self._handles[self.sync.connect(pid)]
        except KeyError:
            raise NotFoundException(f"no command that runs in the background has the pid {pid}") from None

    def __init__(self, sync: Any) -> None:
        self.sync = sync
        self._handles: dict[CommandHandle, AsyncCommandHandle] = {}

    def _keep(self, handle: AsyncCommandHandle) -> AsyncCommandHandle:
        self._handles = {sync: each for sync, each in self._handles.items() if not sync.ended}
        self._handles[handle.sync] = handle
        return handle

    kill = twin(Commands.kill)
    send_stdin = twin(Commands.send_stdin)


class AsyncCommands(_AsyncRunning):
    """Commands, as :class:`Commands`. Callbacks may be coroutine functions."""

    async def run(
        self, cmd: str, background: bool | None = None, envs: Mapping[str, str] | None = None, user: str | None = None,
        cwd: str | None = None, on_stdout: Callable[[str], object] | None = None,
        on_stderr: Callable[[str], object] | None = None, stdin: bool | None = None, timeout: float | None = 60,
        request_timeout: float | None = None,
    ) -> Any:  # fmt: skip
        """As :meth:`Commands.run`; a task that is cancelled kills what does not run in the background."""
        start = functools.partial(self.sync.start, cmd, bool(background), envs, user, cwd, stdin, timeout)
        handle = AsyncCommandHandle(
            await in_thread(start, undo=CommandHandle.disconnect), on_stdout=on_stdout, on_stderr=on_stderr
        )
        if background:
            return self._keep(handle)
        try:
            return await handle.wait()
        finally:
            await handle.disconnect()

    list = twin(Commands.list)
    close_stdin = twin(Commands.close_stdin)


def _end(handle: CommandHandle) -> None:
    try:
        handle.kill()
    finally:
        handle.disconnect()


class AsyncPty(_AsyncRunning):
    """Terminals, as :class:`Pty`."""

    async def create(
        self, size: PtySize, on_data: Callable[[bytes], object], user: str | None = None, cwd: str | None = None,
        envs: Mapping[str, str] | None = None, timeout: float | None = 60, request_timeout: float | None = None,
    ) -> AsyncCommandHandle:  # fmt: skip
        """A shell on a terminal of its own; `on_data` gets its output."""
        make = functools.partial(self.sync.create, size, user, cwd, envs, timeout)
        return self._keep(AsyncCommandHandle(await in_thread(make, undo=_end), on_pty=on_data))

    resize = twin(Pty.resize)


class AsyncWatchHandle:
    """A directory that is watched."""

    def __init__(self, sync: WatchHandle) -> None:
        self.sync = sync

    stop = twin(WatchHandle.stop)


class AsyncFilesystem:
    """Files, as :class:`Filesystem`."""

    def __init__(self, sync: Filesystem) -> None:
        self.sync = sync

    write = twin(Filesystem.write)
    write_files = twin(Filesystem.write_files)
    list = twin(Filesystem.list)
    exists = twin(Filesystem.exists)
    get_info = twin(Filesystem.get_info)
    remove = twin(Filesystem.remove)
    rename = twin(Filesystem.rename)
    make_dir = twin(Filesystem.make_dir)

    async def read(
        self, path: str, format: str = "text", user: str | None = None, request_timeout: float | None = None,
        gzip: bool = False, stream_idle_timeout: float | None = None,
    ) -> Any:  # fmt: skip
        """As :meth:`Filesystem.read`; of ``stream`` an async iterator."""
        read: Any = self.sync.read
        found = await in_thread(lambda: read(path, format, user, request_timeout))
        return each(found) if format == "stream" else found

    async def watch_dir(
        self, path: str, on_event: Callable[[Any], object],
        on_exit: Callable[[BaseException | None], object] | None = None, user: str | None = None,
        request_timeout: float | None = None, timeout: float | None = 60, recursive: bool = False,
        include_entry: bool = False, allow_network_mounts: bool = False,
    ) -> AsyncWatchHandle:  # fmt: skip
        """Watch a directory: `on_event` gets each change, `on_exit` the end, with the error if it is one.

        :param timeout: seconds until it ends; 0 or None: no limit
        """
        refuse_watch(recursive, include_entry)
        with translated():
            changes = await in_thread(
                lambda: self.sync._files.watch(path, user=user, timeout=timeout or None), undo=Watch.close
            )
        heard, ended = _on_the_loop(on_event), _on_the_loop(on_exit)
        return AsyncWatchHandle(WatchHandle(changes, heard, ended))


class AsyncSandbox:
    """A sandbox, as :class:`Sandbox`; an async context manager: ``await AsyncSandbox.create()`` makes one.

    :ivar sync: that object
    """

    def __init__(self, sync: Sandbox) -> None:
        self.sync = sync
        self.native = sync.native
        self.sandbox_id = sync.sandbox_id
        self.files = AsyncFilesystem(sync.files)
        self.commands = AsyncCommands(sync.commands)
        self.pty = AsyncPty(sync.pty)

    @classmethod
    async def create(
        cls, template: str | None = None, timeout: float | None = None, metadata: Mapping[str, str] | None = None,
        envs: Mapping[str, str] | None = None, secure: bool | None = None, allow_internet_access: bool | None = None,
        network: Mapping[str, Any] | None = None, **others: Any,
    ) -> AsyncSandbox:  # fmt: skip
        """One that is up; parameters are those of :meth:`Sandbox.create`."""
        make = functools.partial(
            Sandbox.create, template, timeout, metadata, envs, secure, allow_internet_access, network, **others
        )
        return cls(await in_thread(make, undo=Sandbox.kill))

    @classmethod
    async def _attach(cls, sandbox_id: str, timeout: float | None = None, **others: Any) -> AsyncSandbox:
        return cls(await in_thread(lambda: Sandbox._attach(sandbox_id)))

    @_Both("_attach")
    async def connect(self, timeout: float | None = None, **others: Any) -> AsyncSandbox:
        """As :meth:`Sandbox.connect`."""
        await in_thread(lambda: self.sync.connect(timeout))
        return self

    is_running = twin(Sandbox.is_running)
    set_timeout = twin(Sandbox.set_timeout)
    pause = twin(Sandbox.pause)
    beta_pause = pause
    kill = twin(Sandbox.kill)

    async def get_info(self, **others: Any) -> SandboxInfo:
        """As :meth:`Sandbox.get_info`."""
        return self.sync.get_info()

    def get_host(self, port: int) -> str:
        """As :meth:`Sandbox.get_host`."""
        return self.sync.get_host(port)

    async def fork(self, timeout: float | None = None, count: int | None = None, **others: Any) -> list[AsyncSandbox]:
        """As :meth:`Sandbox.fork`."""

        def undo(copies: Any) -> None:
            for copy in copies:
                copy.kill()

        return [AsyncSandbox(copy) for copy in await in_thread(lambda: self.sync.fork(timeout, count), undo=undo)]

    @classmethod
    def list(cls, **others: Any) -> AsyncPaginator:
        """As :meth:`Sandbox.list`."""
        return AsyncPaginator(Sandbox.list(**others))

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self.kill())


class AsyncPaginator:
    """The sandboxes that run: one page of them."""

    def __init__(self, sync: Paginator) -> None:
        self._sync = sync

    @property
    def has_next(self) -> bool:
        """Whether the page was not had yet."""
        return self._sync.has_next

    async def next_items(self, **others: Any) -> list[SandboxInfo]:
        """All of them."""
        return await in_thread(self._sync.next_items)
