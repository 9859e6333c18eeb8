# SPDX-License-Identifier: Apache-2.0
"""One declaration for each parameter of a configuration, and what follows from it.

A declaration says the parameter's name, type, default and limits, its word on the command line, its name and default
in the API, and what it means. From it come the constructor, ``repr`` and ``==``, the parser of a word like ``--disk``,
the help, the API's bodies and their translation, and the tables of the documentation.

Plain classes: a data class library costs more to import than this whole VMM takes to start.
"""

from __future__ import annotations

import sys

from vmm.config import did_you_mean, parse_count, parse_words
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import SimpleNamespace
    from typing import Any, ClassVar, Self, dataclass_transform

    from vmm.config.typed import option as option
else:
    SimpleNamespace = type(sys.implementation)  # its module takes longer to import than all of this

REQUIRED = object()
_SAME = object()


class Option(SimpleNamespace):
    """The declaration of one parameter; see :func:`vmm.config.typed.option`."""

    help: str
    default: Any = REQUIRED
    kw_only: bool = True
    least: int | None = None
    most: int | None = None
    choices: Mapping[Any, str] | tuple[Any, ...] = ()
    check: Callable[[str, Any], Any] | None = None
    word: str = ""
    words: Mapping[str, str] | None = None
    metavar: str | None = None
    parse: Callable[..., Any] | None = None
    field: str | None = None
    api: str = ""
    api_default: Any = _SAME
    api_means: Any = _SAME
    api_bits: int | None = None
    nullable: bool = False
    extension: bool = False

    @property
    def told(self) -> Mapping[str, str]:
        """Its words on the command line, each with what it means."""
        if self.words is not None:
            return self.words
        return {self.word: self.help} if self.word else {}

    @property
    def meaning_of_none(self) -> Any:
        """What a missing or null value of the API means."""
        return self.default if self.api_means is _SAME else self.api_means

    def read(self, word: str, *texts: str | None) -> Any:
        """The value that `texts`, those of its words, mean; `word` names the first in an error."""
        if self.parse is not None:
            return self.parse(*texts)
        return texts[0] if self.least is None else parse_count(word, texts[0] or "", self.least, self.most)

    def meant(self, word: str, text: str) -> Any:
        """The value that the text of its option on the command line means.

        :raises ConfigError: the value is out of range; the message names `word` without its hyphens
        """
        return self.checked(self.field or word.removeprefix("--"), self.read(word, text))

    def checked(self, field: str, value: Any) -> Any:
        """The value to store.

        :raises ConfigError: `value` is out of range; `field` names it
        """
        if value is None and (self.default is None or self.nullable):
            return None
        if self.choices and value not in self.choices:
            *others, last = filter(None, self.choices)
            raise ConfigError(field, value, f"must be {', '.join(others)} or {last}" if others else f"must be {last}")
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            allowed = f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"
            raise ConfigError(field, value, f"must be {allowed}")
        return value if self.check is None else self.check(field, value)


if not TYPE_CHECKING:
    option = Option


# What an error calls a type: one value, and several.
_CALLED = {
    "str": "a string", "int": "a whole number", "float": "a number", "bool": "True or False", "None": "None",
    "os.PathLike[str]": "a path", "tuple[int, int]": "two whole numbers", "tuple[int, int, int]": "three whole numbers",
    "Mapping[str, str]": "a mapping of strings to strings", "Mapping": "a mapping", "Callable": "a function",
}  # fmt: skip
_LISTED = {"str": "strings", "str | os.PathLike[str]": "strings or paths", "int": "whole numbers"}


_PARTS: dict[tuple[str, str], list[str]] = {}  # of annotations, which are few


def _parts(text: str, separator: str) -> list[str]:
    # `text` split at the separators that are in no brackets.
    if (known := _PARTS.get((text, separator))) is not None:
        return known
    parts: list[str] = []
    for piece in text.split(separator):
        if parts and parts[-1].count("[") > parts[-1].count("]"):
            parts[-1] += separator + piece
        else:
            parts.append(piece)
    _PARTS[text, separator] = parts
    return parts


def _is(value: Any, annotation: str) -> bool:
    kinds = _parts(annotation, " | ")
    if len(kinds) > 1:
        return any(_is(value, kind) for kind in kinds)
    kind, _, inner = annotation.removesuffix("]").partition("[")
    if kind in ("str", "bool"):
        return isinstance(value, str if kind == "str" else bool)
    if kind in ("int", "float"):
        return hasattr(value, "__index__" if kind == "int" else "__float__") and not isinstance(value, bool)
    if kind == "os.PathLike":
        return hasattr(value, "__fspath__")
    if kind == "tuple":
        parts = _parts(inner, ", ")
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(_is, value, parts))
    if kind == "Sequence":
        return isinstance(value, (list, tuple)) and all(_is(each, inner) for each in value)
    if kind == "Mapping":
        key, item = _parts(inner, ", ")
        return hasattr(value, "items") and all(_is(k, key) and _is(v, item) for k, v in value.items())
    if kind == "Callable":
        return callable(value)
    return value is None if kind == "None" else any(each.__name__ == kind for each in type(value).__mro__)


def _called(kind: str) -> str:
    if kind.startswith("Sequence["):
        return f"a list of {_LISTED.get(kind[9:-1], kind[9:-1])}"
    return _CALLED.get(kind) or _CALLED.get(kind.partition("[")[0]) or _one(kind)


def _one(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def check_type(title: str, name: str, annotation: str, value: object) -> None:
    """Refuse a value whose type is not that of the parameter `name`, an annotation of a function or class of `title`.

    :raises TypeError: one line, which says what is allowed
    """
    if not _is(value, annotation):
        plain = value is None or isinstance(value, (str, int, float, list, tuple, dict))
        given = f"{value!r:.60}" if plain else _one(type(value).__name__)
        allowed = " or ".join(map(_called, _parts(annotation, " | ")))
        raise TypeError(f"{title}: {name} must be {allowed}, not {given}")


def check_call(title: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """As ``check_type`` for the parameters of `function`, with ``locals()`` at its start."""
    for name, annotation in function.__annotations__.items():
        if name in values:
            check_type(title, name, annotation, values[name])


def _typed(config: type[Config], name: str, value: Any) -> Any:
    # `value`, as a tuple where any iterable may be given.
    text: str = config.__annotations__[name]
    if text.startswith("Given["):
        text = _parts(text[6:-1], ", ")[1]
    several = text.startswith("Sequence[")
    if several and hasattr(value, "__iter__") and not isinstance(value, (str, bytes, list)):
        value = tuple(value)
    check_type(config.__name__, name, text, value)
    return tuple(value) if several else value


if not TYPE_CHECKING:

    def dataclass_transform(**_: Any) -> Callable[[type], type]:
        """Only type checkers read it."""
        return lambda kind: kind


@dataclass_transform(kw_only_default=True, field_specifiers=(option,), eq_default=False)
class Config:
    """Prints as the call that makes it again; equal to another of the same values.

    :cvar OPTIONS: the declarations by name
    :cvar TITLE: what it configures, as in the name of its option on the command line
    :cvar USAGE: the value of that option, in short
    """

    OPTIONS: ClassVar[dict[str, Option]]
    TITLE: ClassVar[str]
    USAGE: ClassVar[str]
    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __init_subclass__(cls, title: str = "", usage: str = "") -> None:
        cls.TITLE, cls.USAGE = title, usage
        cls.OPTIONS = {name: each for name, each in vars(cls).items() if type(each) is Option}

    if not TYPE_CHECKING:

        def __init__(self, *args: Any, **values: Any) -> None:
            options = self.OPTIONS
            if args:
                named = [name for name, each in options.items() if not each.kw_only]
                if len(args) > len(named):
                    raise TypeError(f"{type(self).__name__} takes {len(named)} values by position, not {len(args)}")
                for name, value in zip(named, args, strict=False):
                    if name in values:
                        raise TypeError(f"{type(self).__name__} was given {name} twice")
                    values[name] = value
            stored = self.__dict__
            for name, each in options.items():
                if name in values:
                    stored[name] = each.checked(self.field(name), _typed(type(self), name, values[name]))
                elif each.default is REQUIRED:
                    raise TypeError(f"{type(self).__name__} needs {name}: {each.help}")
                else:
                    stored[name] = each.default
            if len(values) > len(stored) or not values.keys() <= stored.keys():
                name = next(name for name in values if name not in options)
                raise TypeError(f"{type(self).__name__} has no parameter {name!r}{did_you_mean(name, options)}")
            self._check()

    def _check(self) -> None:
        # What the parameters must be together.
        pass

    @classmethod
    def field(cls, name: str) -> str:
        """What an error calls the parameter `name`."""
        each = cls.OPTIONS[name]
        return each.field or f"{cls.TITLE} {each.word.strip('-=').lower() or name}".lstrip()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            guess = "" if name.startswith("_") else did_you_mean(name, self.OPTIONS)
            raise AttributeError(f"{type(self).__name__} has no parameter {name!r}{guess}")

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.OPTIONS:
            raise AttributeError(f"{type(self).__name__} has no parameter {name!r}{did_you_mean(name, self.OPTIONS)}")
        self.__dict__[name] = self.OPTIONS[name].checked(self.field(name), _typed(type(self), name, value))

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __repr__(self) -> str:
        words = []
        for name, each in self.OPTIONS.items():
            value = getattr(self, name)
            if each.default is REQUIRED and not each.kw_only:
                words.append(self.shown(name, value))
            elif value != each.default:
                words.append(f"{name}={self.shown(name, value)}")
        return f"{type(self).__name__}({', '.join(words)})"

    def shown(self, name: str, value: object) -> str:
        """A value of the parameter `name` as code that makes it."""
        return repr(value)

    def replaced(self, **changes: Any) -> Self:
        """The same with other values for some parameters, which are checked."""
        if not changes.keys() <= self.OPTIONS.keys():
            return type(self)(**vars(self) | changes)  # whose error names the unknown one
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name, value in changes.items():
            setattr(other, name, value)
        other._check()
        return other

    # The command line

    @classmethod
    def words(cls) -> dict[str, str]:
        """The words of its option on the command line, each with what it means."""
        return {word: text for each in cls.OPTIONS.values() for word, text in each.told.items()}

    @classmethod
    def take(cls, text: str) -> tuple[str, dict[str, str]]:
        """The first word of `text` if one stands for itself, and the others by name.

        :raises ConfigError: a word that is not one of its own
        """
        words = [word for word in cls.words() if not word.isupper()]
        return parse_words(f"--{cls.TITLE}", text, words, first=len(words) < len(cls.words()))

    @classmethod
    def parse(cls, text: str, **values: Any) -> Self:
        """From the value of its option on the command line.

        :param values: parameters that are not in `text`, or were found there by other rules
        :raises ConfigError: an unknown word, or a value out of its range
        """
        first, found = cls.take(text)
        for name, each in cls.OPTIONS.items():
            words = [word.removesuffix("=") for word in each.told]
            if name in values or not words:
                continue
            if words[0].isupper():
                if first or each.default is REQUIRED:
                    values[name] = each.read(f"{cls.TITLE} {words[0]}", first)
            elif any(word in found for word in words):
                if isinstance(each.default, bool):
                    values[name] = not each.default
                else:
                    values[name] = each.read(cls.field(name), *(found.get(word) for word in words))
            elif each.default is REQUIRED:
                raise ConfigError(f"--{cls.TITLE}", text, f"lacks {words[0]}=; give {cls.USAGE}")
        return cls(**values)
