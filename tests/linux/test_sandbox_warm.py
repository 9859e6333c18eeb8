# SPDX-License-Identifier: Apache-2.0
"""Sandboxes that start from a snapshot that the first of their kind has left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm import Sandbox, images
from vmm.sandbox import guest, warm

pytestmark = pytest.mark.timeout(900)  # the first one may build r3
MEMORY = 96 << 20


@pytest.fixture
def places(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[images.Image, Path]:
    """The image, and where snapshots are kept."""
    image = guest.find_image("busybox")
    keep = warm._keep
    # A guest makes its boot_id when that is read for the first time.
    monkeypatch.setattr(warm, "_keep", lambda sandbox, directory: (_boot(sandbox), keep(sandbox, directory)))
    monkeypatch.setattr(warm, "cache_root", lambda: str(tmp_path))
    return image, tmp_path / "warm"


def _start(image: images.Image) -> Sandbox:
    return warm.start(image, memory=MEMORY, cpus=1, network="none", boot_timeout=60)


def _boot(sandbox: Sandbox) -> str:
    return sandbox.files.read("/proc/sys/kernel/random/boot_id")


def test_the_second_is_a_copy_of_the_first_and_a_damaged_one_is_made_again(places: tuple[images.Image, Path]) -> None:
    image, kept = places
    with _start(image) as first, _start(image) as second:
        assert _boot(first) == _boot(second)
        first.files.write("/tmp/of-the-first", "x")
        assert not second.files.exists("/tmp/of-the-first")
        assert first.files.read("/proc/sys/kernel/random/uuid") != second.files.read("/proc/sys/kernel/random/uuid")
        before = _boot(first)
    (snapshot,) = kept.iterdir()
    (snapshot / "state").write_bytes(b"damaged")
    with _start(image) as again:
        assert _boot(again) != before
    assert [each.name for each in kept.iterdir()] == [snapshot.name]
    assert (snapshot / "state").read_bytes() != b"damaged"


def test_only_the_last_that_were_used_are_kept(
    places: tuple[images.Image, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, kept = places
    monkeypatch.setattr(warm, "KEPT", 1)
    (kept / "old").mkdir(parents=True)
    (kept / "key.0123abcd.new").mkdir()  # of a process that was killed
    os.utime(kept / "key.0123abcd.new", (0, 0))
    with _start(image):
        pass
    assert len(list(kept.iterdir())) == 1 and not (kept / "old").exists()
