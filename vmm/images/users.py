# SPDX-License-Identifier: Apache-2.0
"""The user that a container image names, looked up in the image's own /etc/passwd and /etc/group."""

from __future__ import annotations

from typing import NamedTuple

from vmm.errors import line
from vmm.images.host import PullError

_HIGHEST = (1 << 32) - 2


class User(NamedTuple):
    """Who a program runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]  # beside gid
    home: str


def look_up(user: str, passwd: bytes, group: bytes) -> User:
    """Return who ``user`` is: ``NAME`` or ``UID``, perhaps with ``:GROUP`` or ``:GID``; empty is root.

    As docker has it: a number need not be in the files, and further groups count only if no group is named.

    Source: OCI Image Format Specification 1.1, config.md, "User".
    :raises PullError: a name is not in the files
    """
    name, _, wanted = user.partition(":")
    name = name or "0"
    # name:password:uid:gid:comment:home:shell, and name:password:gid:members
    users = [words for words in _lines(passwd, 6) if _number(words[2]) is not None and _number(words[3]) is not None]
    groups = [words for words in _lines(group, 4) if _number(words[2]) is not None]
    number = _number(name)
    found = next((words for words in users if words[0] == name), None)
    if found is None and number is not None:
        found = next((words for words in users if _number(words[2]) == number), None)
    if found is not None:
        uid, gid, home = int(found[2]), int(found[3]), found[5] or "/"
    elif number is not None:
        uid, gid, home = number, 0, "/root" if number == 0 else "/"
    else:
        raise PullError(f"the image's user {line(name)} is not in its /etc/passwd")
    if not wanted:
        more = (int(words[2]) for words in groups if found is not None and found[0] in words[3].split(","))
        return User(uid, gid, tuple(dict.fromkeys(each for each in more if each != gid)), home)
    named = next((int(words[2]) for words in groups if words[0] == wanted), _number(wanted))
    if named is None:
        raise PullError(f"the image's group {line(wanted)} is not in its /etc/group")
    return User(uid, named, (), home)


def _lines(data: bytes, fields: int) -> list[list[str]]:
    lines = (line.split(":") for line in data.decode(errors="surrogateescape").splitlines())
    return [words for words in lines if len(words) >= fields]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 11 and int(text) <= _HIGHEST else None
