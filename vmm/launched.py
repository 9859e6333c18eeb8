# SPDX-License-Identifier: Apache-2.0
"""What ``vmm/launcher.c`` hands over: a name, where to import from, a listening socket; a start without detours.

Without the launcher (``python -m vmm``, a program that imports us) none of this is there, and this does nothing.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_waits: tuple[int, str] | None = None  # the socket that nobody has taken yet, and its path


class _Site:
    # The last finder: what is in none of our places may be in a place that only `site` knows, as a dependency in the
    # system's packages below a virtual environment.
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        sys.meta_path.remove(_Site)
        import site
        from importlib.machinery import PathFinder

        site.main()
        return PathFinder.find_spec(name, path if isinstance(path, list) else None)


def begin() -> None:
    """Take over from the launcher, first thing in the process."""
    global _waits
    # What is imported now stays: to look for garbage in it costs a tenth of a start.
    gc.disable()
    options = sys._xoptions
    sys.argv[0] = str(options["pyvmm"])
    sys.meta_path.append(_Site)
    # msgspec uses it where it is there, for the sake of old Pythons; with all that it brings it is a third of msgspec.
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]  # the documented way: ModuleNotFoundError
    if place := options.get("pyvmm_socket"):
        number, _, path = str(place).partition(":")
        _waits = int(number), path
        os.set_inheritable(int(number), False)


def take_socket(path: str) -> int | None:
    """The descriptor of the socket that listens at `path` already; the caller's from here on. None: there is none."""
    global _waits
    if _waits is None or _waits[1] != path:
        return None
    fd, _waits = _waits[0], None
    return fd


def drop_socket() -> None:
    """Close the socket and remove its file if nobody took it: the command line had a mistake; idempotent."""
    global _waits
    if _waits is not None:
        (fd, path), _waits = _waits, None
        os.unlink(path)
        os.close(fd)


def settle() -> None:
    """The start is over: what there is will stay, what comes is looked through for garbage as ever; idempotent."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
