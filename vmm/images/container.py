# SPDX-License-Identifier: Apache-2.0
"""What a container image says of the program in it: entrypoint, environment, user, volumes."""

from __future__ import annotations

import msgspec


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the program of a container image is to be started, as the image has it; checked when it was pulled.

    ``uid``, ``gid``, ``groups`` and ``home`` are what ``user`` means by the image's own /etc/passwd and /etc/group.

    Source: OCI Image Format Specification 1.1, config.md.
    """

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    user: str = ""  # as written: "", "1000", "app:www-data"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()  # beside gid
    home: str = "/root"
    working_dir: str = "/"
    volumes: tuple[str, ...] = ()  # absolute paths
    exposed_ports: tuple[str, ...] = ()  # "80/tcp"
    stop_signal: str = "SIGTERM"
    labels: dict[str, str] = {}

    @property
    def argv(self) -> list[str]:
        """The program and its arguments: entrypoint, then cmd. Empty if the image names none."""
        return [*self.entrypoint, *self.cmd]

    @property
    def stop_number(self) -> int:
        """The number of ``stop_signal`` in a guest."""
        import signal

        name, _, above = self.stop_signal.partition("+")
        return int(signal.Signals[name]) + int(above or 0)
