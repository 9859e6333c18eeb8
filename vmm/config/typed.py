# SPDX-License-Identifier: Apache-2.0
"""How a declaration is written, for type checkers: at run time ``option`` is :class:`vmm.config.option.Option`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

_Stored = TypeVar("_Stored", covariant=True)
_Taken = TypeVar("_Taken", contravariant=True)


class Given(Generic[_Stored, _Taken]):
    """The type of a parameter that is converted: what is stored, and what is taken as well."""

    def __get__(self, config: object, kind: object) -> _Stored:
        raise NotImplementedError

    def __set__(self, config: object, value: _Taken) -> None: ...


def option(
    *,
    help: str,
    default: Any = ...,
    kw_only: bool = True,
    least: int | None = None,
    most: int | None = None,
    choices: Mapping[Any, str] | tuple[Any, ...] = (),
    check: Callable[[str, Any], Any] | None = None,
    word: str = "",
    words: Mapping[str, str] | None = None,
    metavar: str | None = None,
    parse: Callable[..., Any] | None = None,
    field: str | None = None,
    api: str = "",
    api_default: Any = ...,
    api_means: Any = ...,
    api_bits: int | None = None,
    nullable: bool = False,
    extension: bool = False,
) -> Any:
    """Declare a parameter.

    :param help: what it means, for every documentation
    :param default: where it is left out; without one it has to be given
    :param kw_only: False: it may be given by its position, too
    :param least: least allowed number
    :param most: largest allowed number
    :param choices: the values that are allowed; a mapping has the API's word for each
    :param check: called with the field's name and the value; returns what is stored, raises ``ConfigError``
    :param word: its word on the command line: ``ro`` is a switch, ``queues=`` has a value, ``PATH`` is the first
    :param words: its words if it has several, each with its own help; replaces `word`
    :param metavar: what stands for the value of an option of its own, such as ``--memory``
    :param parse: makes the value of the texts of its words
    :param field: its name in an error, if it is not the device's and the word
    :param api: its name in the API
    :param api_default: its default in the API where that is another; ``REQUIRED``: the API has none
    :param api_means: what a missing or null value of the API means, or an API without it, if not the default
    :param api_bits: the size of the number in the API, if it takes others than those from `least` to `most`
    :param nullable: the API takes null, though its default is another
    :param extension: Firecracker's API does not have it; it is left out of an answer unless it was set
    """
    raise NotImplementedError
