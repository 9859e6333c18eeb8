# SPDX-License-Identifier: Apache-2.0
"""A sandbox by E2B's names."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from vmm.config.devices import NetworkPolicy
from vmm.errors import ConfigError
from vmm.sandbox import registry
from vmm.sandbox.e2b.commands import Commands, Pty
from vmm.sandbox.e2b.errors import InvalidArgumentException, SandboxNotFoundException, translated
from vmm.sandbox.e2b.files import Filesystem
from vmm.sandbox.sandbox import Sandbox as Native
from vmm.sandbox.session import Session, attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from vmm.sandbox.ports import Published

ALL_TRAFFIC = "0.0.0.0/0"
DEFAULT_TIMEOUT = 300  # seconds; E2B's
# Settings of E2B's service, which does not exist here.
_OF_A_SERVICE = frozenset((
    "api_headers", "api_key", "api_url", "debug", "domain", "headers", "http_version", "idempotency_key", "logger",
    "proxy", "request_timeout", "retries", "sandbox_url", "secure", "validate_api_key",
))  # fmt: skip


class SandboxState(StrEnum):
    """Whether it runs."""

    PAUSED = "paused"
    RUNNING = "running"


@dataclass
class SandboxInfo:
    """A sandbox. What its own process alone knows of it is None of one of another process."""

    sandbox_id: str
    template_id: str
    name: str | None
    metadata: dict[str, str]
    started_at: datetime
    end_at: datetime | None
    state: SandboxState
    cpu_count: int | None
    memory_mb: int | None


class _Both:
    # A method of an object, and another function when it is called on the class: ``kill()`` and ``kill(sandbox_id)``.

    def __init__(self, on_class: str) -> None:
        self._on_class = on_class

    def __call__(self, method: Callable[..., Any]) -> _Both:
        self._method = method
        functools.update_wrapper(self, method)
        return self

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return getattr(owner, self._on_class)
        return functools.partial(self._method, instance)


def settings_of(
    template: str | None, timeout: float | None, envs: Mapping[str, str] | None, allow_internet_access: bool | None,
    network: Mapping[str, Any] | None, others: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The same for ``vmm.Sandbox``.

    :raises InvalidArgumentException: an option is not supported here
    """
    found = {name: value for name, value in others.items() if name not in _OF_A_SERVICE and value is not None}
    for name in ("mcp", "iam", "lifecycle", "volume_mounts"):
        if name in found:
            raise InvalidArgumentException(f"{name}: is not supported here")
    return {
        "image": template or "debian", "timeout": DEFAULT_TIMEOUT if timeout is None else timeout, "env": envs or {},
        "network": _network(network) if network else "user" if allow_internet_access else "none", **found,
    }  # fmt: skip


def _network(network: Mapping[str, Any]) -> str | NetworkPolicy:
    allow, deny = network.get("allow_out"), network.get("deny_out") or ()
    others = sorted(network.keys() - {"allow_out", "deny_out"})
    if others or callable(allow) or callable(deny):
        raise InvalidArgumentException(f"network {' '.join(others)}: must have only the lists allow_out and deny_out")
    if ALL_TRAFFIC in deny:  # but for what is allowed
        allow, deny = allow or (), [each for each in deny if each != ALL_TRAFFIC]
    if allow is not None and not allow:
        return "none"
    with translated():
        return NetworkPolicy([ALL_TRAFFIC] if allow is None else allow, deny=deny)


class Sandbox:
    """A sandbox by E2B's names; a context manager, which ends it.

    ``Sandbox.create()`` makes one, ``Sandbox.connect(id)`` finds one that another process of this user runs.

    :ivar native: the :class:`vmm.Sandbox`, with all that E2B's has no name for; of another process a
        :class:`vmm.sandbox.Session`
    :ivar sandbox_id: its name, as ``pyvmm ps`` has it
    """

    def __init__(
        self, template: str | None = None, timeout: float | None = None, metadata: Mapping[str, str] | None = None,
        envs: Mapping[str, str] | None = None, *, allow_internet_access: bool | None = None,
        network: Mapping[str, Any] | None = None, **others: Any,
    ) -> None:  # fmt: skip
        with translated():
            native = Native(**settings_of(template, timeout, envs, allow_internet_access, network, others))
        self._wrap(native, native.name, metadata)

    def _wrap(self, native: Session, name: str, metadata: Mapping[str, str] | None) -> None:
        self.native = native
        self.sandbox_id = name
        self.files = Filesystem(native.files)
        self.commands = Commands(native)
        self.pty = Pty(native)
        self._metadata = dict(metadata or {})
        self._began = datetime.now(UTC)
        self._published: dict[int, Published] = {}

    @classmethod
    def _of(cls, native: Session, name: str, metadata: Mapping[str, str] | None = None) -> Sandbox:
        self = cls.__new__(cls)
        self._wrap(native, name, metadata)
        return self

    @classmethod
    def create(
        cls, template: str | None = None, timeout: float | None = None, metadata: Mapping[str, str] | None = None,
        envs: Mapping[str, str] | None = None, secure: bool | None = None, allow_internet_access: bool | None = None,
        network: Mapping[str, Any] | None = None, **others: Any,
    ) -> Sandbox:  # fmt: skip
        """One that is up.

        :param template: an image, as ``vmm.Sandbox`` has it; None: ``debian``
        :param timeout: seconds after which it ends; None: 300
        :param metadata: is kept for ``get_info``
        :param allow_internet_access: whether passt connects it to the Internet; otherwise it has no network
        :param network: ``{"allow_out": [...], "deny_out": [...]}``: a policy
        :param others: parameters of ``vmm.Sandbox``, as `memory` and `cpus`; those of E2B's service have no effect
        :raises InvalidArgumentException: a value is not allowed
        :raises SandboxException: the sandbox did not start
        """
        return cls(
            template, timeout, metadata, envs, allow_internet_access=allow_internet_access, network=network, **others
        )

    @classmethod
    def _attach(cls, sandbox_id: str, timeout: float | None = None, **others: Any) -> Sandbox:
        try:
            return cls._of(attach(sandbox_id), sandbox_id)
        except ConfigError as error:
            raise SandboxNotFoundException(str(error)) from error

    @_Both("_attach")
    def connect(self, timeout: float | None = None, **others: Any) -> Sandbox:
        """Let it go on if it is paused. ``Sandbox.connect(sandbox_id)`` finds one of another process.

        :param timeout: seconds from now on after which it ends; None: as before
        """
        with translated():
            self._own().resume()
        if timeout is not None:
            self.set_timeout(timeout)
        return self

    def _own(self) -> Native:
        if not isinstance(self.native, Native):
            raise InvalidArgumentException(f"sandbox {self.sandbox_id}: only the process that made it can do this")
        return self.native

    def is_running(self, request_timeout: float | None = None) -> bool:
        """Whether it has not ended."""
        return not self.native._link.look()

    def set_timeout(self, /, timeout: float, **others: Any) -> None:
        """End it so many seconds from now on."""
        with translated():
            self._own().set_timeout(timeout)

    def get_info(self, **others: Any) -> SandboxInfo:
        """What it is."""
        native = self.native
        if not isinstance(native, Native):
            return _info(native._about, self.sandbox_id)
        config, end = native.machine.config, native.time_left
        return SandboxInfo(
            self.sandbox_id, native._about["image"], native._about["image"], dict(self._metadata), self._began,
            _end_of(time.time(), end),
            SandboxState.PAUSED if native.machine.state == "Paused" else SandboxState.RUNNING,
            config.cpus, config.memory >> 20,
        )  # fmt: skip

    def get_host(self, port: int) -> str:
        """``127.0.0.1:PORT`` of this host, which leads to that port of the guest's loopback; plain TCP, without TLS."""
        if port not in self._published:
            with translated():
                self._published[port] = self.native.publish(port)
        host, number = self._published[port].address
        return f"{host}:{number}"

    def pause(self, /, **others: Any) -> bool:
        """Hold it, in memory; ``connect()`` lets it go on. Whether it was not paused before."""
        native = self._own()
        if native.machine.state == "Paused":
            return False
        with translated():
            native.pause()
        return True

    beta_pause = pause

    def fork(self, timeout: float | None = None, count: int | None = None, **others: Any) -> list[Sandbox]:
        """Copies of it that run; it goes on, too.

        :param timeout: seconds after which each ends; None: as this one was given
        """
        with translated():
            copies = self._own().fork(1 if count is None else count, timeout=timeout)
        return [self._of(copy, copy.name, self._metadata) for copy in copies]

    def kill(self, /, **others: Any) -> bool:
        """End it; whether it ran. One of another process is ended by that process alone."""
        for published in self._published.values():
            published.close()
        self._published.clear()
        native = self._own()
        ran = native.running
        native.close()
        return ran

    @classmethod
    def list(cls, **others: Any) -> Paginator:
        """The sandboxes of this user that run.

        :raises InvalidArgumentException: there is a `query`: filters are not supported here
        """
        if others.get("query"):
            raise InvalidArgumentException("query: all sandboxes are listed, look through them")
        return Paginator()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Paginator:
    """The sandboxes that run: one page of them."""

    def __init__(self) -> None:
        self.has_next = True
        self.next_token: str | None = None

    def next_items(self, **others: Any) -> list[SandboxInfo]:
        """All of them."""
        self.has_next = False
        return [_info(each, each["name"]) for each in registry.all_running()]


def _info(about: Mapping[str, Any], name: str) -> SandboxInfo:
    began = about["began"]
    return SandboxInfo(
        name, about["image"], about["image"], {}, datetime.fromtimestamp(began, UTC),
        _end_of(began, about.get("timeout")), SandboxState.RUNNING, None, None,
    )  # fmt: skip


def _end_of(began: float, timeout: float | None) -> datetime | None:
    try:
        return None if timeout is None else datetime.fromtimestamp(began + timeout, UTC)
    except (ValueError, OverflowError):  # never, as of a limit of infinity
        return None
