# SPDX-License-Identifier: Apache-2.0
"""`pyvmm run KERNEL oci:...`: a container image's disk under an overlay, and its program as the image has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.images.layouts import Made, directory, entry, layer
from tests.linux import container_image, kernels, r3
from vmm import images
from vmm.images import host

ROOT = Path(__file__).parents[2]
PROGRAM = {
    "Entrypoint": ["sh", "-c"],
    "Cmd": ["id; pwd; echo \"$A\"; echo new >/srv/new && cat /srv/new; cat /gone; test -c /dev/null && exit 9"],
    "Env": ["A=a  b"],
    "User": "web",
    "WorkingDir": "/srv",
}  # fmt: skip


class Container(NamedTuple):
    """A pulled image, and the kernel it is booted with."""

    name: str
    kernel: str
    cache: Path

    def run(self, *options: str, append: str = "") -> tuple[int, str]:
        """Run it; its status, and what its console said."""
        command = [sys.executable, "-m", "vmm", "run", self.kernel, self.name, "--memory", "128M", *options]
        done = subprocess.run(
            [*command, "--append", f"{r3.CMDLINE.replace('console=ttyS0 ', '')} quiet {append}"],
            cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(self.cache)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout.decode(errors="replace")


@pytest.fixture(scope="module")
def container(native: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """An image of busybox in two layers."""
    kernel = kernels.kernel().path
    cache = tmp_path_factory.mktemp("cache")
    yield Container(container_image.pull(cache, PROGRAM), kernel, cache)


def test_program_runs_as_the_image_says(container: Container) -> None:
    status, said = container.run()
    assert status == 9, said
    assert "uid=33(web) gid=34(www) groups=4(log),34(www)" in said
    lines = said.splitlines()
    assert {"/srv", "a  b", "new", "cat: can't open '/gone': No such file or directory"} <= set(lines)


def test_words_replace_cmd_and_writes_may_go_to_a_disk(container: Container, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run([host.tool("mke2fs"), "-q", "-t", "ext4", disk], check=True)
    status, said = container.run("--disk", str(disk), append='overlay=/dev/vdb -- "echo kept >/srv/kept"')
    assert status == 0, said
    debugfs = [host.tool("debugfs"), "-R", "cat upper/srv/kept", str(disk)]
    assert subprocess.run(debugfs, check=True, capture_output=True).stdout == b"kept\n"


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [("nosuch", 127, "pyvmm: nosuch: not found"), ("data", 126, "pyvmm: data: cannot be executed")],
)
def test_program_that_cannot_run(container: Container, program: str, status: int, said: str) -> None:
    name = container.name.replace("layout", program)
    made = Made(
        [layer(directory("bin"), entry("bin/data", b"data", mode=0o644))],
        {"Entrypoint": [program]},
    )
    made.write(Path(name.removeprefix("oci:")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(container.cache))
        images.pull(name)
    found = container._replace(name=name).run()
    assert found[0] == status, found[1]
    assert said in found[1].splitlines()


def test_image_that_is_not_here(container: Container) -> None:
    assert container._replace(name="oci:no/such").run() == (
        2, "pyvmm run: image oci:no/such: is not in the cache; fetch it with: pyvmm pull oci:no/such\n",
    )  # fmt: skip


def test_last_words_are_heard(container: Container) -> None:
    """What a program has just written when it ends: a session leader's end throws away what waits in its terminal."""
    status, said = container.run(append='-- "seq 1000 2000"')
    assert status == 0, said
    assert [line for line in said.splitlines() if line.isdigit()] == [str(number) for number in range(1000, 2001)]
