# SPDX-License-Identifier: Apache-2.0
"""The report of the side-by-side runs: what counts as held, and what the runner's exit status says."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from benches.peers import __main__ as runner
from benches.peers import boot_inside, common
from benches.peers.common import Row, alone, compare
from benches.peers.firecracker import Missing


def test_ratio_is_the_median_of_pairs() -> None:
    # A slow moment that hits one round of both must not show.
    row = compare("launch", "ms", [10, 100, 12], [20, 200, 24], "peer", 1.0)
    assert (row.ours, row.peer, row.ratio) == (12, 24, 0.5)
    assert str(row) == "launch: pyvmm 12.0 ms, peer 24.0 ms, ratio 0.50, goal 1, held"


@pytest.mark.parametrize(("goal", "held"), [(0.49, False), (0.5, True), (None, True)])
def test_goal_is_on_the_ratio(goal: float | None, held: bool) -> None:
    assert compare("x", "ms", [1.0], [2.0], "peer", goal).held is held


@pytest.mark.parametrize(("goal", "held"), [(2.01, False), (2.0, True), (None, True)])
def test_goal_where_more_is_better(goal: float | None, held: bool) -> None:
    row = compare("x", "MB/s", [2.0], [1.0], "peer", goal, more_is_better=True)
    assert row.held is held
    assert ("goal at least" in str(row)) is (goal is not None)


@pytest.mark.parametrize(("goal", "held"), [(25.0, True), (24.0, False)])
def test_goal_without_a_peer_is_on_the_value(goal: float, held: bool) -> None:
    assert alone("x", "MiB", [24.5], goal).held is held


@pytest.mark.parametrize(
    ("found", "status", "line"),
    [
        ([alone("x", "ms", [1.0], 2.0)], 0, "x: pyvmm 1.0 ms, peer none, ratio none, goal 2, held\n"),
        ([alone("x", "ms", [3.0], 2.0)], 1, "x: pyvmm 3.0 ms, peer none, ratio none, goal 2, missed\n"),
        ([Missing("no peer")], 1, "MISSING: launch: no peer\n"),
    ],
    ids=["held", "missed", "missing"],
)
def test_runner_prints_writes_and_ends(
    found: list[Row | Missing],
    status: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = types.SimpleNamespace(rows=lambda: found)
    monkeypatch.setitem(sys.modules, "benches.peers.launch", module)
    monkeypatch.setattr(sys, "argv", ["peers", "launch", "--output", str(tmp_path)])
    monkeypatch.setattr(runner, "_plot", lambda rows, path: None)
    monkeypatch.setattr(runner, "lost_time", iter((0.01, 0.5)).__next__)
    assert runner.main() == status
    assert capsys.readouterr().out == f"{line}processor time taken by others, before and after: 1%, 50%\n"
    report = json.loads((tmp_path / "peers.json").read_text())
    assert report["lost"] == [0.01, 0.5]
    assert len(report["rows"]) + len(report["missing"]) == 1


def test_lost_time_is_a_part_of_the_processors() -> None:
    assert 0 <= runner.lost_time() < 1


def test_status_other_than_the_guests_is_no_measurement() -> None:
    with pytest.raises(Missing, match="ended with 1, not 0: false"):
        common.timed(["false"], 0)


def test_guest_that_never_speaks_is_no_measurement() -> None:
    with pytest.raises(Missing, match=r"no sign of its guest's init: echo hello\nhello"):
        boot_inside.seconds(["echo", "hello"])
