# SPDX-License-Identifier: Apache-2.0
"""Sandboxes by Ray's own interface, on a cluster of two nodes: ``make ray``. Not in ``make test``: it fetches 75 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benches.peers.firecracker import Missing
from tests.api.third_party import fetched
from tests.images.layouts import docker_registry
from tests.linux import container_image
from vmm.images import host

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # the first one may build r3


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Variables of a process that uses Ray; what Ray leaves is removed."""
    try:
        place = fetched("ray==2.60.0")
    except Missing as problem:
        pytest.fail(f"LAYER MISSING: ray: {problem}", pytrace=False)
    # What a test pulls is in a cache of its own, beside what the others have made.
    cache = host.cache_root()
    # Not pytest's own directory, below which the paths of Ray's sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as below:
        (Path(below) / "cache/pyvmm/images").mkdir(parents=True)
        for shared in ("debs", "images/busybox"):
            (Path(below) / "cache/pyvmm" / shared).symlink_to(cache / shared)
        yield {
            **os.environ, "XDG_CACHE_HOME": f"{below}/cache",
            "PYTHONPATH": f"{ROOT}:{place}", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": below,
        }  # fmt: skip


@pytest.fixture(scope="module")
def found(runtime: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``tests.linux.ray_cluster`` saw."""
    home = tmp_path_factory.mktemp("registry")
    layout = container_image.write(home / "layout", {"Env": ["PATH=/bin"], "WorkingDir": "/srv/app", "Cmd": ["sh"]})
    with docker_registry(home) as place:
        copy = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{layout}:latest"]
        subprocess.run([*copy, f"docker://{place}/test/box:1"], check=True, capture_output=True)
        done = subprocess.run(
            [sys.executable, "-m", "tests.linux.ray_cluster", f"{place}/test/box:1"],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(result)
    return result


def test_both_nodes_run_commands_and_keep_files_apart(found: dict[str, Any]) -> None:
    assert found["nodes"] == 2 and found["running"] == 2
    assert found["said"] == [[0, "ray\n/work\nLinux\n"]] * 2
    assert found["read"] == [0, 255]
    assert found["read_only"] == 1  # as Ray has it, unless it is told otherwise
    assert found["other"] == ["SandboxError", "[Errno 2] No such file or directory: '/work/data'"]
    assert found["config"] == "busybox"


def test_errors_are_rays(found: dict[str, Any]) -> None:
    assert found["late"][0] == "SandboxTimeoutError" and found["status"] == "RUNNING"
    assert found["deleted"][0] == "SandboxNotFoundError"
    assert found["refused"][1].endswith("SandboxCreationError: network 'host': must be none or public")
    assert found["killed"] == "ActorDiedError"


def test_an_image_of_a_registry_has_a_network(found: dict[str, Any]) -> None:
    assert found["public"] == [0, "/srv/app\nnameserver 192.0.2.53\nthe page\n"]


def test_bad_input_is_one_line(found: dict[str, Any]) -> None:
    for said, problem in zip(found["bad"], ("dns 'a b'", "workdir 'work'", "/no/such.tar: No such file"), strict=True):
        assert problem in said and "\n" not in said


def test_nothing_is_left_however_it_ends(found: dict[str, Any]) -> None:
    assert found["expired"] == "TERMINATED"
    for how in ("kill_and_delete", "ttl", "forgotten", "node_death"):
        assert found[f"after_{how}"] == [], how
    assert found["files"] == []


def test_the_example(runtime: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "examples/ray_sandboxes.py", "busybox", "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["3 right"], done.stdout[-2000:] + done.stderr[-3000:]
