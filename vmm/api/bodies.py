# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests: JSON into typed values, or one line of what is wrong: field, value, rule."""

from __future__ import annotations

from typing import Any

import msgspec

from vmm.api import ApiError

encode = msgspec.json.Encoder().encode
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def decode(kind: Any, body: bytes) -> Any:
    """A body as a value of type `kind`.

    :raises ApiError: it is none; names the field, the value and what is allowed
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        return decoder.decode(body)
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
    # Of the value at `path` in one of type `kind`, by msgspec's own view of the type.
    found: Any = msgspec.inspect.type_info(kind)
    for step in path.replace("[", ".[").split("."):
        if isinstance(found, msgspec.inspect.UnionType):
            found = next(each for each in found.types if hasattr(each, "fields") or hasattr(each, "item_type"))
        if step.startswith("["):
            found = getattr(found, "item_type", None)
        elif step:
            found = next((each.type for each in getattr(found, "fields", ()) if each.encode_name == step), None)
    return found


def _alternatives(found: Any) -> tuple[Any, ...]:
    return found.types if isinstance(found, msgspec.inspect.UnionType) else (found,)


def _fields(kind: Any, path: str) -> list[str]:
    found = next((each for each in _alternatives(_type_at(kind, path)) if hasattr(each, "fields")), None)
    return [each.encode_name for each in getattr(found, "fields", ())]


def _words(kind: Any, path: str) -> list[str]:
    # What an enumeration allows.
    enums = [each for each in _alternatives(_type_at(kind, path)) if isinstance(each, msgspec.inspect.LiteralType)]
    return [str(value) for each in enums for value in each.values]
