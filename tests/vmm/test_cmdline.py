# SPDX-License-Identifier: Apache-2.0
"""The command line: quoting, what goes before init's parameters, limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.cmdline import Cmdline, parameter
from vmm.errors import ConfigError

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)


def next_arg(args: bytes) -> tuple[bytes, bytes | None, bytes]:
    """The kernel's next_arg(), line by line: the parameter, its value, the rest."""
    in_quote = quoted = False
    equals = 0
    if args[:1] == b'"':
        args, in_quote, quoted = args[1:], True, True
    i = 0
    while i < len(args):
        if args[i : i + 1] in SPACES and not in_quote:
            break
        if not equals and args[i : i + 1] == b"=":
            equals = i
        if args[i : i + 1] == b'"':
            in_quote = not in_quote
        i += 1
    word, rest = args[:i], args[i + 1 :].lstrip(b"".join(SPACES))
    if not equals:
        return word.removesuffix(b'"') if quoted else word, None, rest
    value = word[equals + 1 :]
    if value[:1] == b'"':
        value = value[1:].removesuffix(b'"')
    elif quoted:
        value = value.removesuffix(b'"')
    return word[:equals], value, rest


SPACES = [bytes([each]) for each in b" \t\n\v\f\r\xa0"]


def parsed(line: str) -> tuple[list[tuple[bytes, bytes | None]], bytes | None]:
    """The kernel's parameters, and what is left for init."""
    rest = line.encode("utf-8", "surrogateescape").lstrip(b"".join(SPACES))
    found: list[tuple[bytes, bytes | None]] = []
    while rest:
        name, value, rest = next_arg(rest)
        if value is None and name == b"--":
            return found, rest
        found.append((name, value))
    return found, None


def test_parts_are_appended_with_one_space() -> None:
    line = Cmdline("console=ttyS0 ")
    line.append(" panic=-1")
    assert str(line) == "console=ttyS0 panic=-1"


def test_what_is_added_goes_before_the_parameters_of_init() -> None:
    line = Cmdline("quiet -- --verbose x")
    line.append("virtio_mmio.device=4K@0xd0000000:5")
    assert str(line) == "quiet virtio_mmio.device=4K@0xd0000000:5 -- --verbose x"


def test_a_quoted_double_dash_is_not_the_end_of_the_kernels_parameters() -> None:
    line = Cmdline('dyndbg="file a.c -- +p" ro')
    line.append("quiet")
    assert str(line) == 'dyndbg="file a.c -- +p" ro quiet'


def test_a_name_is_not_found_inside_another() -> None:
    assert not Cmdline("earlyconsole=x").has("console")
    assert not Cmdline("console2=x").has("console")
    assert Cmdline("a console=x").has("console")
    assert Cmdline("console=hvc0 no-kvmclock").has("no_kvmclock")


def test_white_space_inside_quotes_stays_and_outside_too() -> None:
    line = Cmdline('  a="x  y"   b\t-- "c  d"  ')
    line.append("root=/dev/vda")
    assert str(line) == 'a="x  y"   b root=/dev/vda -- "c  d"'


def test_what_is_added_may_have_words_for_init() -> None:
    line = Cmdline("quiet -- single")
    line.append("ro -- more")
    line.append("last")
    assert str(line) == "quiet ro last -- single more"
    assert str(Cmdline("a --")) == "a --"


def test_words_are_removed_by_name() -> None:
    line = Cmdline('root=/dev/vda rw quiet x="rw  ro" -- rw')
    line.remove("root", "rw", "ro")
    assert str(line) == 'quiet x="rw  ro" -- rw'


def test_what_belongs_to_init_or_is_part_of_a_word_is_not_the_kernels() -> None:
    assert not Cmdline("quiet -- root=/dev/vda").has("root")
    assert not Cmdline('x="a root=/dev/vda"').has("root")
    assert not Cmdline("nfsroot=/x").has("root")


def test_a_value_with_white_space_is_quoted() -> None:
    assert parameter("root", "my tag") == 'root="my tag"'
    assert parsed(parameter("root", "my tag")) == ([(b"root", b"my tag")], None)
    assert parameter("root", "tag") == "root=tag"
    with pytest.raises(ConfigError, match="double quote"):
        parameter("root", 'a"b')


@pytest.mark.parametrize("text", ["a\nb", "na\xefve", "\x01\x7f", "\udcff raw", "a\r\nb"])
def test_every_byte_but_nul_goes_through_as_in_firecracker(text: str) -> None:
    assert Cmdline(text).encode() == text.encode("utf-8", "surrogateescape") + b"\0"


@pytest.mark.parametrize(
    ("text", "found"),
    [("a\0b", r"character 1 is '\x00'"), ("a\ud800", "character 1"), ('a="b', "a double quote is not closed")],
)
def test_what_no_kernel_takes(text: str, found: str) -> None:
    for make in (Cmdline, Cmdline("").append):
        with pytest.raises(ConfigError) as error:
            make(text)
        assert found in str(error.value)
        assert error.value.field == "cmdline"


def test_the_limit_is_named_with_the_length() -> None:
    assert Cmdline("x" * 2047).encode() == b"x" * 2047 + b"\0"
    with pytest.raises(ConfigError, match="is 2048 bytes long; this kernel takes 2047"):
        Cmdline("\xef" * 1024).encode()
    with pytest.raises(ConfigError, match="is 256 bytes long; this kernel takes 255"):
        Cmdline("x" * 256).encode(255)


@given(PRINTABLE, PRINTABLE)
def test_every_parameter_survives_in_order(text: str, part: str) -> None:
    try:
        line, added = Cmdline(text), Cmdline(part)
    except ConfigError:
        return  # an open quote, which swallows what follows in the kernel, too
    line.append(part)
    (ours, init), (more, further) = parsed(text), parsed(part)
    for_init = None if init is None and further is None else b" ".join(each for each in (init, further) if each)
    found, rest = parsed(str(line))
    assert (found, None if rest is None else rest.split()) == (
        ours + more,
        None if for_init is None else for_init.split(),
    )
    for name, _ in more:
        assert added.has(name.decode())
