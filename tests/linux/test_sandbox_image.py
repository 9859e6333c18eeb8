# SPDX-License-Identifier: Apache-2.0
"""What a container image says of its program holds for a sandbox's commands."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.buildah import Buildah
from tests.linux import container_image
from tests.linux.command import pyvmm
from vmm import Sandbox, images

pytestmark = pytest.mark.timeout(900)  # the first one may build r3
PROGRAM = {
    "Entrypoint": ["sh", "-c"],
    "Cmd": ["trap 'echo stopped; exit 5' QUIT; id; pwd; echo $A $HOME; while :; do sleep 0.01; done"],
    "Env": ["A=of the image", "PATH=/bin"],
    "User": "web",
    "WorkingDir": "/srv/app",
    "Volumes": {"/data": {}},
    "StopSignal": "SIGQUIT",
}


@pytest.fixture(scope="module")
def image(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its name; in the cache that is used meanwhile."""
    cache = tmp_path_factory.mktemp("cache")
    name = container_image.pull(cache, PROGRAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield name


def test_commands_run_as_the_image_says_and_as_they_are_told(image: str, tmp_path: Path) -> None:
    with Sandbox(image, memory="128M", env={"B": "of the call"}) as sandbox:
        assert sandbox.program == [*PROGRAM["Entrypoint"], *PROGRAM["Cmd"]]
        said = sandbox.run("id; pwd; echo $A, $B, $PATH, $HOME; ls -d /data").stdout
        assert said == (
            "uid=33(web) gid=34(www) groups=4(log),34(www)\n/srv/app\nof the image, of the call, /bin, /var\n/data\n"
        )
        told = sandbox.run("id; pwd; echo $A", user="root", cwd="/", env={"A": "here"}).stdout
        assert told == "uid=0(root) gid=0\n/\nhere\n"
        assert sandbox.run("id", user="web:log").stdout == "uid=33(web) gid=4(log) groups=4(log)\n"
        with sandbox.exec(sandbox.program) as process:
            assert process.stdout.readline(10) == b"uid=33(web) gid=34(www) groups=4(log),34(www)\n"
            assert process.stop().exit_code == 5
        with sandbox.exec("trap '' QUIT; echo deaf; while :; do sleep 0.01; done") as process:
            assert process.stdout.readline(10) == b"deaf\n"
            assert process.stop(timeout=0.05).signal == signal.SIGKILL
        sandbox.snapshot(str(tmp_path / "kept"))
        copy = sandbox.fork()[0]
    with copy, Sandbox.restore(str(tmp_path / "kept")) as restored:
        for each in (copy, restored):
            assert each.run("pwd; echo $A").stdout == "/srv/app\nof the image\n"


def test_commands_run_as_buildah_runs_them(image: str, tmp_path: Path) -> None:
    buildah = Buildah(tmp_path)
    container = buildah("from", image)
    more = ["--user=web:log", "--workingdir=/srv", "--env=C=two  words", "--env=EMPTY=", "--volume=/more"]
    buildah("config", *more, container)
    name = f"oci:{tmp_path}/layout"
    buildah("commit", container, f"{name}:1")
    images.pull(name)
    names = "^HOSTNAME= -e ^USER= -e ^LOGNAME="  # either has its own
    look = f"pwd; id; env | grep -v -e {names} | sort; umask; stat -c '%n %A %u:%g' /* /dev/null"
    with Sandbox(name, memory="128M") as sandbox:
        ours = set(sandbox.run(look).stdout.splitlines())
    theirs = set(buildah("run", container, "--", "sh", "-c", look).splitlines())
    assert "uid=33(web) gid=4(log) groups=4(log)" in theirs
    assert theirs <= ours


def test_the_command_runs_the_images_program_and_passes_its_stop_signal_on(image: str) -> None:
    command = [sys.executable, "-m", "vmm", "sandbox", "--memory", "128M", image]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.terminate()
        rest = process.stdout.read()
    assert lines == [b"uid=33(web) gid=34(www) groups=4(log),34(www)\n", b"/srv/app\n", b"of the image /var\n"]
    assert (rest, process.returncode) == (b"stopped\n", 5)


@pytest.mark.parametrize(
    ("options", "words", "status", "said"),
    [
        ([], ["echo $0 $1; exit 3", "zero", "one"], 3, b"zero one\n"),  # all of it goes to sh -c
        ([], ["--", "echo $0; exit 4", "--", "one"], 4, b"--\n"),
        (["--entrypoint", "echo"], ["a  b"], 0, b"a  b\n"),
        (["--entrypoint", ""], ["pwd"], 0, b"/srv/app\n"),
    ],
)
def test_words_behind_the_image_are_its_entrypoints(
    image: str, options: list[str], words: list[str], status: int, said: bytes
) -> None:
    done = pyvmm("sandbox", "--memory", "128M", *options, image, *words)
    assert (done.returncode, done.stdout, done.stderr) == (status, said, b"")
