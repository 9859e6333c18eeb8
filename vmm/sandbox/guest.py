# SPDX-License-Identifier: Apache-2.0
"""What a sandbox's VM boots: the image's kernel, its drivers, and the agent as process 1."""

from __future__ import annotations

import contextlib
import os
from signal import SIGTERM

from vmm.config import did_you_mean
from vmm.config.policy import BITS, GATEWAY, GUEST, RESOLVER
from vmm.errors import ConfigError
from vmm.images import NAMES, Image, resolve
from vmm.images.cpio import Archive
from vmm.images.reference import KINDS
from vmm.kvm.vm import runs_linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vmm.config.devices import NetworkPolicy
    from vmm.images.container import ImageConfig

    Words = dict[str, Any]

# A kernel for all sandboxes, in place of the image's: with every driver built in.
KERNEL_VARIABLE = "PYVMM_SANDBOX_KERNEL"
# What a virtual machine need not ask for, or say, costs time.
CMDLINE = "console=ttyS0 quiet reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd 8250.nr_uarts=1 "
CMDLINE += "random.trust_cpu=1 cgroup_no_v1=all"


def agent() -> bytes:
    """The agent, an ELF program.

    :raises ConfigError: pyvmm was not built whole
    """
    path = os.path.join(os.path.dirname(__file__), "agent.elf")
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError("agent", path, "is missing: install pyvmm again, or run `make install`") from None


def archive() -> bytes:
    """An initramfs that holds the agent as /init; it goes behind that of an image."""
    made = Archive()
    for directory in ("proc", "sys", "dev"):
        made.directory(directory)
    made.console()
    made.file("init", agent(), 0o755)
    return made.to_bytes()


def find_image(image: str | Image) -> Image:
    """The image of that name; a name of a registry's, as ``python`` or ``python:3.12``, need not have ``oci:`` before.

    :raises ConfigError: the image was not pulled
    """
    if not isinstance(image, str):
        return image
    found = resolve(image)
    if found is None and image not in NAMES and image.partition(":")[0] not in KINDS and image.strip(":/."):
        image = f"oci:{image}"
        found = resolve(image)
    if found is None:
        close = "" if image in NAMES else did_you_mean(image.removeprefix("oci:"), NAMES)
        raise ConfigError("image", image, f"is not in the cache: run `pyvmm pull {image or 'NAME'}`{close}")
    return found


def commands_of(config: ImageConfig | None, env: Mapping[str, str], cwd: str | None, user: str | int | None) -> Words:
    """What holds for commands that say nothing else: as they were given, then as the image has it."""
    if config is None:
        return {"env": dict(env), "cwd": cwd, "user": user, "stop_signal": int(SIGTERM)}
    return {
        "env": {**config.env, **env}, "cwd": config.working_dir if cwd is None else cwd,
        "user": config.user or None if user is None else user, "program": config.argv,
        "entrypoint": list(config.entrypoint), "stop_signal": config.stop_number,
    }  # fmt: skip


def kernel_and_initrd(image: Image, kernel: str | None, directory: str) -> tuple[str, str]:
    """Paths of the kernel and the initramfs; the latter is made in `directory`, and may go once the machine is made.

    :raises ConfigError: this host's KVM cannot run the image's kernel
    """
    kernel = kernel or os.environ.get(KERNEL_VARIABLE) or None
    drivers = b""
    if kernel is None:
        if not runs_linux():
            problem = (
                "a stock Linux does not run on a software KVM, as this host's is; run the program by "
                f"`pyvmm lab -- python3 PROGRAM`, or name a kernel that does run (kernel=, {KERNEL_VARIABLE})"
            )
            raise ConfigError("kernel", image.kernel, problem)
        kernel = image.kernel
        with open(image.initrd, "rb") as file:
            drivers = file.read()
    path = os.path.join(directory, "initrd")
    with open(path, "wb") as file:
        file.write(drivers)
        file.write(bytes(-len(drivers) % 4))
        file.write(archive())
    return kernel, path


def network_words(policy: NetworkPolicy | None) -> str:
    """The guest's addresses for the kernel's command line: passt takes any, and the nameserver is the host's or ours.

    Source: resolv.conf(5); a nameserver on the host's loopback is systemd-resolved's, which has its own in a file.
    """
    if policy is not None:
        return f"pyvmm.net={GUEST}/{BITS},{GATEWAY},{RESOLVER}"
    servers: list[str] = []
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            words = [line.split() for line in file]
            servers += [each[1] for each in words if len(each) > 1 and each[0] == "nameserver"]
    usable = [server for server in servers if ":" not in server and not server.startswith("127.")]
    return f"pyvmm.net={GUEST}/{BITS},{GATEWAY},{usable[0] if usable else ''}"
