# SPDX-License-Identifier: Apache-2.0
"""``pyvmm run`` parses plain command lines without argparse: the two must not differ."""

from __future__ import annotations

import argparse
import contextlib
import io

from hypothesis import given
from hypothesis import strategies as st

from vmm.commands.run import OPTIONS, add_arguments, parse_quickly

WORDS = st.one_of(
    st.sampled_from([option for option, *_ in OPTIONS]),
    st.sampled_from(["-v", "-h", "--help", "--", "-", "--cpu", "--memory=1G", "-1", "1", "0x1", " 1", "٣", "", "a b"]),
    st.text(max_size=6),
)


@given(st.lists(WORDS, max_size=8))
def test_quick_parse_agrees_with_argparse(words: list[str]) -> None:
    quick = parse_quickly(words)
    if quick is None:
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            full = parser.parse_intermixed_args(words)
    except SystemExit:
        raise AssertionError(f"argparse refuses what was parsed quickly: {words}") from None
    assert vars(quick) | {"rootfs": quick.rootfs} == vars(full)


def test_every_plain_command_line_is_quick() -> None:
    words = ["kernel", "rootfs"]
    for option, metavar, default, _ in OPTIONS:
        words += [option] if metavar is None else [option, "2" if isinstance(default, int) else "value"]
    assert parse_quickly(words) is not None
