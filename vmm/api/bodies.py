# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests: JSON into typed values, or one line of what is wrong: field, value, rule."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from vmm.api import ApiError

encode = msgspec.json.Encoder().encode


def decode(kind: Any, body: bytes) -> Any:
    """A body as a value of type `kind`.

    :raises ApiError: the body is invalid; names the field, the value and what is allowed
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        problem = explain(kind, body, error)
        raise ApiError(f"An error occurred when deserializing the json body of a request: {problem}.") from None


def explain(kind: Any, body: bytes, error: Exception) -> str:
    """What is wrong with `body`, with the value that is, and the fields that are allowed where one is not."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return text
    problem, _, where = text.partition(" - at `")
    path = where.removesuffix("`").removeprefix("$")
    if "unknown field" in problem:
        allowed = _fields(kind, path)
        return f"{text}; allowed: {', '.join(allowed)}" if allowed else text
    if "missing required field" in problem or not path:
        return text
    if problem.startswith("Invalid enum value") and (words := _words(kind, path)):
        problem = f"must be one of {', '.join(words)}"
    try:
        value = _at(msgspec.json.decode(body), path)
    except (LookupError, TypeError, ValueError):
        return f"{path.lstrip('.')}: {problem}"  # "[...]": somewhere in a list or an object, it does not say where
    shown = encode(value).decode()
    return f"{path.lstrip('.')} {shown if len(shown) <= 64 else shown[:61] + '...'}: {problem}"


def _at(value: Any, path: str) -> Any:
    for step in path.replace("[", ".[").split("."):
        if step:
            value = value[int(step[1:-1]) if step.startswith("[") else step]
    return value


def _type_at(kind: Any, path: str) -> Any:
    # The type of the value at `path` in one of type `kind`; None if there is no such path.
    for step in filter(None, path.replace("[", ".[").split(".")):
        if step.startswith("["):
            kind = next((get_args(each)[0] for each in _alternatives(kind) if get_origin(each) in (list, tuple)), None)
        elif (struct := _struct(kind)) is not None:
            fields = dict(zip(struct.__struct_encode_fields__, struct.__struct_fields__, strict=True))
            kind = get_type_hints(struct)[fields[step]] if step in fields else None
        else:
            return None
    return kind


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _struct(kind: Any) -> Any:
    return next((each for each in _alternatives(kind) if hasattr(each, "__struct_fields__")), None)


def _fields(kind: Any, path: str) -> tuple[str, ...]:
    return getattr(_struct(_type_at(kind, path)), "__struct_encode_fields__", ())


def _words(kind: Any, path: str) -> list[str]:
    # What is allowed where only certain words are.
    every = [get_args(each) for each in _alternatives(_type_at(kind, path)) if get_origin(each) is Literal]
    return sorted(str(word) for words in every for word in words)
