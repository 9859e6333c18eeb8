# SPDX-License-Identifier: Apache-2.0
"""Sandboxes on many machines: ``ray.experimental.sandbox`` with VMs of pyvmm in place of gVisor's containers.

``ray.init(runtime_env={"worker_process_setup_hook": "vmm.sandbox.ray.use_pyvmm"})``; Ray's own interface does the rest.
Needs ray 2.60 or later (``pip install pyvmm-kvm[ray]``) and /dev/kvm on each node. See docs/sandbox.md.

Source: ray 2.60.0, python/ray/experimental/sandbox: backend/base.py, config.py, image_manager.py, runtime.py.
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import math
import os
import posixpath
import time

from ray.experimental.sandbox import runtime
from ray.experimental.sandbox.backend.base import BaseSandboxBackend, ExecResult, SandboxStatus
from ray.experimental.sandbox.config import DEFAULT_PUBLIC_DNS, parse_memory_bytes
from ray.experimental.sandbox.exceptions import (
    SandboxCreationError,
    SandboxError,
    SandboxExecError,
    SandboxNotFoundError,
    SandboxTimeoutError,
)
from ray.experimental.sandbox.image_manager import BaseImageManager

from vmm import images
from vmm.errors import ConfigError, VmmError
from vmm.images import reference
from vmm.sandbox import guest, registry, warm
from vmm.sandbox.errors import CommandTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from ray.experimental.sandbox.config import SandboxConfig

    from vmm.images import Image

DEFAULT_MEMORY = 512 << 20  # bytes; of a sandbox that Ray gives none
MOST_OUTPUT = 256 << 20  # bytes of each stream of a command
_MIB = 1 << 20
_NETWORKS = {"none": "none", "public": "user"}


def use_pyvmm() -> None:
    """Have Ray's sandboxes of this process be VMs. It is made to be Ray's ``worker_process_setup_hook``.

    :raises ConfigError: a Ray whose sandboxes have no such place
    """
    import ray

    for name in ("GVisorSandboxBackend", "ImageManager"):
        if not hasattr(runtime, name):
            raise ConfigError("ray", ray.__version__, f"has no {name} in its sandbox's runtime: 2.60 has")
    runtime.GVisorSandboxBackend = PyvmmSandboxBackend
    runtime.ImageManager = PyvmmImageManager
    registry.all_running()  # removes what killed workers have left


def image_name(image: str) -> str:
    """pyvmm's name of what Ray calls an image: of a registry, or the path of a ``docker save`` archive."""
    if image in images.NAMES or image.partition(":")[0] in reference.KINDS:
        return image
    is_path = os.path.isfile(image) or image.startswith("/")
    return f"docker-archive:{os.path.abspath(image)}" if is_path else f"oci:{image}"


@contextlib.contextmanager
def _rays(kind: type[Exception]) -> Iterator[None]:
    """Our errors as Ray's: a timeout as its timeout, each other one as `kind`."""
    try:
        yield
    except CommandTimeout as error:
        raise SandboxTimeoutError(str(error)) from error
    except (VmmError, OSError) as error:
        raise kind(str(error)) from error


class PyvmmImageManager(BaseImageManager):  # type: ignore[misc]
    """Images of ``pyvmm pull``; this node pulls one the first time."""

    def pull_image(self, image: str, timeout_seconds: float = 120.0, instance_id: str | None = None) -> str:
        """Pull an image, unless it is here.

        :param timeout_seconds: is not used: a registry that stalls has limits of its own
        :returns: its directory
        :raises SandboxCreationError: the image cannot be pulled
        """
        with _rays(SandboxCreationError):
            name = image_name(image)
            return os.path.dirname((images.resolve(name) or images.pull(name)).rootfs)

    def _find(self, image: str) -> Image:
        with _rays(SandboxCreationError):
            return guest.find_image(image_name(image))

    def get_image_dir(self, image: str) -> str:
        """The directory of an image that is here."""
        return os.path.dirname(self._find(image).rootfs)

    def get_image_config(self, image: str) -> dict[str, Any]:
        """What a container image says of its program, by OCI's names; empty for others."""
        config = self._find(image).config
        if config is None:
            return {}
        return {
            "Env": self.get_envs(image), "WorkingDir": config.working_dir, "Cmd": list(config.argv),
            "User": config.user,
        }  # fmt: skip

    def get_workdir(self, image: str) -> str | None:
        """The image's directory, or None."""
        config = self._find(image).config
        return (config.working_dir or None) if config else None

    def get_envs(self, image: str) -> list[str]:
        """The image's environment: ``NAME=VALUE`` each."""
        config = self._find(image).config
        return [f"{name}={value}" for name, value in config.env.items()] if config else []

    def create_oci_spec(self, *_: object, **__: object) -> dict[str, Any]:
        """Refused: a VM has none."""
        raise SandboxCreationError("a sandbox of pyvmm is a VM, and has no OCI runtime specification")

    prepare_oci_bundle = create_oci_spec


class PyvmmSandboxBackend(BaseSandboxBackend):  # type: ignore[misc]
    """Sandboxes in this process: they end with it, however it ends.

    :param image_manager: Ray's runtime gives a :class:`PyvmmImageManager`
    """

    def __init__(self, image_manager: PyvmmImageManager | None = None) -> None:
        super().__init__(image_manager=image_manager or PyvmmImageManager())
        self._sandbox_metadata: dict[str, dict[str, Any]] = {}  # Ray's actor reads its "config"

    def create_sandbox(self, config: SandboxConfig) -> str:
        """A VM that is up: a copy of one that this node has booted before, where it has no network.

        :raises SandboxCreationError: a VM cannot be as `config` asks, or it did not start
        """
        _refuse(config)
        with _rays(SandboxCreationError):
            registry.all_running()
            self._image_manager.pull_image(config.image, timeout_seconds=config.timeout_seconds)
            image = guest.find_image(image_name(config.image))
            memory = -(-(parse_memory_bytes(config.memory) or DEFAULT_MEMORY) // _MIB) * _MIB
            sandbox = warm.start(
                image, memory=memory, cpus=max(1, math.ceil(config.cpu or 0)), network=_NETWORKS[config.network],
                boot_timeout=config.timeout_seconds,
            )  # fmt: skip
            cwd = config.workdir or (image.config.working_dir if image.config else "") or "/"
            try:
                sandbox.files.make_dir(cwd)
                if config.network == "public":
                    servers = config.dns or DEFAULT_PUBLIC_DNS
                    sandbox.files.write("/etc/resolv.conf", "".join(f"nameserver {each}\n" for each in servers))
                if config.readonly:
                    sandbox.make_read_only("/tmp", *([config.workdir] if config.workdir else []))
            except BaseException:
                sandbox.close()
                raise
        self._sandbox_metadata[sandbox.name] = {"config": config, "cwd": cwd, "sandbox": sandbox}
        atexit.register(sandbox.close)
        return sandbox.name

    def delete_sandbox(self, sandbox_id: str) -> None:
        """End the sandbox and give back all that it held; does nothing if no sandbox has this id."""
        about = self._sandbox_metadata.pop(sandbox_id, None)
        if about is not None:
            about["sandbox"].close()
            atexit.unregister(about["sandbox"].close)

    def exec_command(
        self,
        sandbox_id: str,
        command: str | Sequence[str],
        timeout: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        shell: str | None = None,
        user: str | None = None,
    ) -> ExecResult:
        """Run a command to its end; parameters as Ray has them.

        :raises SandboxTimeoutError: the command took longer than `timeout` seconds, and was killed
        :raises SandboxExecError: the sandbox has ended, or the command wrote more than 256 MiB
        """
        about = self._about(sandbox_id)
        config: SandboxConfig = about["config"]
        words = [shell or config.shell, "-c", command] if isinstance(command, str) else list(command)
        begun = time.monotonic()
        with _rays(SandboxExecError):
            result = about["sandbox"].run(
                words, timeout=timeout, cwd=cwd or about["cwd"], env={**config.env, **(env or {})}, user=user,
                limit=MOST_OUTPUT,
            )  # fmt: skip
        if result.truncated:
            raise SandboxExecError(f"the command wrote more than {MOST_OUTPUT} bytes: have it write to a file")
        return ExecResult(result.exit_code, result.stdout, result.stderr, time.monotonic() - begun)

    def write_file(self, sandbox_id: str, path: str, content: str | bytes, append: bool = False) -> None:
        """Write a file, or to its end; directories above it are made. A relative path is below the sandbox's directory.

        :raises SandboxError: the file cannot be written; the message says why
        """
        about = self._about(sandbox_id)
        with _rays(SandboxError):
            about["sandbox"].files.write(posixpath.join(about["cwd"], path), content, append=append)

    def read_file(self, sandbox_id: str, path: str) -> bytes:
        """What is in a file.

        :raises SandboxError: the file cannot be read; the message says why
        """
        about = self._about(sandbox_id)
        with _rays(SandboxError):
            data: bytes = about["sandbox"].files.read_bytes(posixpath.join(about["cwd"], path))
            return data

    def get_status(self, sandbox_id: str) -> SandboxStatus:
        """``RUNNING``, or ``TERMINATED``: also if the guest ended by itself, or no sandbox has this id."""
        about = self._sandbox_metadata.get(sandbox_id)
        return SandboxStatus.RUNNING if about and about["sandbox"].running else SandboxStatus.TERMINATED

    def _about(self, sandbox_id: str) -> dict[str, Any]:
        try:
            return self._sandbox_metadata[sandbox_id]
        except KeyError:
            raise SandboxNotFoundError(f"no sandbox has the id {sandbox_id!r}, or it was deleted") from None


def _refuse(config: SandboxConfig) -> None:
    """Refuse what a VM cannot be, instead of making something else."""
    problem = ""
    if config.network not in _NETWORKS:
        problem = f"network {config.network!r}: must be none or public"
    elif config.capabilities is not None:
        problem = "capabilities: leave it out; root of a VM has all of them, and the host gives it none"
    elif config._oci_spec_transform_fn is not None:
        problem = "_oci_spec_transform_fn: a VM has no OCI runtime specification"
    elif config.workdir and not config.workdir.startswith("/"):
        problem = f"workdir {config.workdir!r}: must begin with /"
    elif wrong := [each for each in config.dns or () if not _is_address(each)]:
        problem = f"dns {wrong[0]!r}: must be an IP address"
    if problem:
        raise SandboxCreationError(problem)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
