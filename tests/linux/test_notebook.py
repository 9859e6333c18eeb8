# SPDX-License-Identifier: Apache-2.0
"""examples/notebook_kernel.py with ipykernel and jupyter_client: ``make notebook``, since it fetches much."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benches.peers.firecracker import Missing
from tests.api.third_party import fetched
from vmm.images import host

ROOT = Path(__file__).parents[2]
PULL = ("pull", "debian", "--packages", "python3-ipykernel", "--size", "2G")
pytestmark = [pytest.mark.notebook, pytest.mark.timeout(900)]  # the first one makes the image, and may build r3


@pytest.fixture(scope="module")
def environment(runtime: Path) -> dict[str, str]:
    """Variables of a process that has jupyter_client, and an image with a kernel in a cache of its own."""
    try:
        client = fetched("jupyter_client==8.10.0")
    except Missing as problem:
        pytest.fail(f"LAYER MISSING: notebook: {problem}", pytrace=False)
    cache = host.cache_root() / "notebook"
    made = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": f"{ROOT}:{client}"}
    done = subprocess.run([sys.executable, "-m", "vmm", *PULL], env=made, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"LAYER MISSING: notebook: {done.stderr[-500:]}", pytrace=False)
    return made


def _run(environment: dict[str, str], *words: str) -> tuple[int, str, str]:
    command = [sys.executable, "examples/notebook_kernel.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_each_notebook_runs_its_cells_and_keeps_its_files_apart(environment: dict[str, str]) -> None:
    cells = ("print(open('/tmp/a', 'a').write('x'))", "open('/tmp/a').read()", "1 / 0", "print('not run')")
    status, said, problems = _run(environment, "--notebooks", "2", *cells)
    assert (status, said) == (2, "1\n'x'\nZeroDivisionError: division by zero\n" * 2), problems


def test_what_is_missing_is_told(environment: dict[str, str]) -> None:
    lacks = {**environment, "PYTHONPATH": str(ROOT)}
    status, _, problem = _run(lacks, "1")
    assert status == 2 and problem.endswith("cells need jupyter_client: pip install jupyter_client\n")
    status, _, problem = _run(environment, "--image", "nowhere")
    assert status == 1 and problem.startswith("notebook_kernel: image oci:nowhere: is not in the cache")
