# SPDX-License-Identifier: Apache-2.0
"""``pyvmm jailer`` that tells at its end which imports were tried in the jail, where there is nothing to import."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.commands import cli, jailer, serve

if TYPE_CHECKING:
    from vmm.config import Arguments


class Recorder:
    """A finder that finds nothing and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        self.asked.append(name)


def main() -> int:
    """The jailer's own exit code."""
    sys.argv[0] = cli.__file__  # which --exec-file is a link to
    real, recorder = serve.main, Recorder()

    def recorded(args: Arguments, on_ready: Callable[[], object] = lambda: None, *, files: bool = True) -> int:
        sys.meta_path.insert(0, recorder)
        status = real(args, on_ready, files=files)
        print("imports tried in the jail:", *recorder.asked)
        return status

    serve.main = recorded
    args = cli.parse("jailer", jailer, sys.argv[1:])
    return jailer.main(args)


if __name__ == "__main__":
    sys.exit(main())
