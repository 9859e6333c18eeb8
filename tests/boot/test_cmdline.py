# SPDX-License-Identifier: Apache-2.0
"""The command line: quoting, what goes before init's parameters, limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boot.cmdline import Cmdline, encode, split
from vmm.errors import ConfigError

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)


def test_parts_are_appended_with_one_space():
    line = Cmdline("console=ttyS0 ")
    line.append(" panic=-1")
    assert str(line) == "console=ttyS0 panic=-1"


def test_what_is_added_goes_before_the_parameters_of_init():
    line = Cmdline("quiet -- --verbose x")
    line.append("virtio_mmio.device=4K@0xd0000000:5")
    assert str(line) == "quiet virtio_mmio.device=4K@0xd0000000:5 -- --verbose x"


def test_a_quoted_double_dash_is_not_the_end_of_the_kernels_parameters():
    line = Cmdline('dyndbg="file a.c -- +p" ro')
    line.append("quiet")
    assert str(line) == 'dyndbg="file a.c -- +p" ro quiet'


def test_default_does_not_override_the_user():
    line = Cmdline("console=hvc0 no-kvmclock")
    line.default("console=ttyS0")
    line.default("no_kvmclock")
    line.default("reboot=t")
    assert str(line) == "console=hvc0 no-kvmclock reboot=t"


def test_a_name_is_not_found_inside_another():
    assert not Cmdline("earlyconsole=x").has("console")
    assert not Cmdline("console2=x").has("console")
    assert Cmdline("a console=x").has("console")


def test_split_as_the_kernel_does():
    assert split('a  "b c"\td="e f"g h') == ["a", '"b c"', 'd="e f"g', "h"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("a\0b", r"character 1 is '\x00'"), ("ab\n", "character 2"), ("naïve", "'ï'"), ("\x7f", "character 0")],
)
def test_characters_that_no_kernel_takes(text, found):
    with pytest.raises(ConfigError) as error:
        Cmdline(text)
    assert found in str(error.value)
    assert error.value.field == "cmdline"
    with pytest.raises(ConfigError):
        encode(text)
    with pytest.raises(ConfigError):
        Cmdline("").append(text)


def test_the_limit_is_named_with_the_length():
    assert encode("x" * 2047) == b"x" * 2047 + b"\0"
    with pytest.raises(ConfigError, match="is 2048 characters long; this kernel takes 2047"):
        encode("x" * 2048)
    with pytest.raises(ConfigError, match="is 256 characters long; this kernel takes 255"):
        encode("x" * 256, 255)


@given(PRINTABLE, PRINTABLE)
def test_every_parameter_survives_in_order(text, part):
    line = Cmdline(text)
    if text.count('"') % 2 or part.count('"') % 2:
        return  # an open quote swallows what follows, in the kernel too
    line.append(part)
    words = split(text)
    at = words.index("--") if "--" in words else len(words)
    assert split(str(line)) == words[:at] + split(part) + words[at:]
