# SPDX-License-Identifier: Apache-2.0
"""`pyvmm pull`: fetch and make guest images."""

from __future__ import annotations

import os
import sys

from vmm import images

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Add this command's arguments to its parser."""
    parser.add_argument(
        "image",
        nargs="?",
        help="name of the image, such as debian; or a container image: oci:REF, oci:DIR, docker-archive:FILE, dir:DIR",
    )
    parser.add_argument("--list", action="store_true", help="list the images and which of them are in the cache")
    parser.add_argument(
        "--refresh",
        "--force",
        action="store_true",
        help="make it again from what apt or the registry offers now, even if it is in the cache",
    )
    parser.add_argument(
        "--size",
        metavar="SIZE",
        help="size of the root file system, such as 2G (sparse); of a container image, its limit unpacked (8G)",
    )
    parser.add_argument("--packages", metavar="A,B", default="", help="more Debian packages for the root file system")


def main(args: Namespace) -> int:
    """Run the command; returns its exit status.

    :raises ConfigError: the arguments
    :raises PullError: the image cannot be made on this host, or not now
    """
    from vmm.config import parse_size
    from vmm.errors import ConfigError

    if args.list:
        _list()
        return 0
    if args.image is None:
        raise ConfigError("image", "", "name an image, e.g. `pyvmm pull debian`; `pyvmm pull --list` shows them")
    packages = [name for name in args.packages.split(",") if name]
    size = None if args.size is None else parse_size("--size", args.size)
    with _Progress() as progress:
        image = images.pull(args.image, refresh=args.refresh, size=size, packages=packages, progress=progress)
    state = "is ready" if progress.step or args.refresh else "is in the cache (--refresh makes it again)"
    print(f"{image.name} {state}: {os.path.dirname(image.kernel)}")
    print(f"run it with: pyvmm run {image.name}")
    return 0


def _list() -> None:
    for entry in images.available():
        if entry["cached"]:
            size = f"{entry['bytes'] / (1 << 20):.0f} MiB on disk"
            state = f"cached: kernel {entry['kernel_version']}, {size}, {entry['built']}"
            if entry["packages"]:
                state += f", with {', '.join(entry['packages'])}"
        else:
            state = f"damaged: {entry['damaged']}" if "damaged" in entry else "not pulled"
        print(f"{entry['name']:<9} {entry['summary']}\n{'':<10}{state}")


class _Progress:
    # on a terminal one line that is drawn again, otherwise a line for each step

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self.step = ""  # the last one; an image that is in the cache takes none
        self._drawn = -1

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._tty and self.step:
            self._draw("")

    @staticmethod
    def _width() -> int:
        try:
            return os.get_terminal_size(sys.stderr.fileno()).columns or 80
        except OSError:
            return 80

    @staticmethod
    def _draw(line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def __call__(self, step: str, done: float | None) -> None:
        percent = -1 if done is None else int(done * 100)
        if step == self.step and percent == self._drawn:
            return
        if not self._tty:
            if step != self.step:
                print(step, file=sys.stderr, flush=True)
        else:
            bar = "" if percent < 0 else f" [{'#' * (percent // 5):<20}] {percent:3d} %"
            width = self._width()
            self._draw((step[: max(width - len(bar) - 1, 10)] + bar)[: width - 1])
        self.step, self._drawn = step, percent
