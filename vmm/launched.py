# SPDX-License-Identifier: Apache-2.0
"""Take over from ``vmm/launcher.c``: a name, the path of the packages, a listening socket; and start fast.

Without the launcher (``python -m vmm``, a program that imports pyvmm) this does nothing.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

warm = False  # whether this process started from the image of `pyvmm prepare`
_waits: tuple[int, str] | None = None  # the socket that nobody has taken yet, and its path


class _Site:
    # The last finder: what is in none of our places may be in a place that only `site` knows, as a dependency in the
    # system's packages below a virtual environment.
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        sys.meta_path.remove(_Site)
        import site
        from importlib.machinery import PathFinder

        site.main()
        return PathFinder.find_spec(name, path if isinstance(path, list) else None)


def begin() -> None:
    """Take over from the launcher, first thing in the process, which looks for no garbage yet."""
    _take_name_and_socket()
    sys.meta_path.append(_Site)


def _take_name_and_socket() -> None:
    # What the launcher's options say of them.
    global _waits
    sys.argv[0] = str(sys._xoptions["pyvmm"])
    if place := sys._xoptions.get("pyvmm_socket"):
        number, _, path = str(place).partition(":")
        _waits = int(number), path
        os.set_inheritable(int(number), False)


def resume() -> None:
    """Go on from the start image that `pyvmm prepare` saved, as the launcher's process.

    With that process's arguments, environment, streams, signals, time zone and socket in place of the saved one's.
    """
    global warm
    import _signal  # type: ignore[import-not-found]  # `signal` makes enumerations first
    import time

    from vmm import _start_image

    warm = True
    words, environment, name, path, fd, ignored, held = _start_image.handed_over()
    sys.argv[1:] = map(os.fsdecode, words[1:])
    # As the launcher gives them to an interpreter.
    del sys._xoptions["pyvmm_save"]
    sys._xoptions["pyvmm"] = os.fsdecode(name)
    if held:
        sys._xoptions["pyvmm_held"] = True
    if fd >= 0:
        sys._xoptions["pyvmm_socket"] = f"{fd}:{os.fsdecode(path)}"
    _take_name_and_socket()
    # The C library has it already. os.environ.update() would give it a copy of each variable; so what is behind, which
    # no stub has.
    os.environ._data.clear()  # type: ignore[attr-defined]
    pairs = (each.partition(b"=") for each in reversed(environment))  # of two with one name the first one counts
    os.environ._data.update({key: value for key, sign, value in pairs if sign})  # type: ignore[attr-defined]
    time.tzset()
    for number in range(1, _signal.NSIG):
        if ignored >> (number - 1) & 1 or number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # the interpreter's own two
            _signal.signal(number, _signal.SIG_IGN)
        elif number == _signal.SIGINT:
            _signal.signal(number, _signal.default_int_handler)
    for number, standard in enumerate(("stdin", "stdout", "stderr")):
        try:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)
        except OSError:
            stream = None  # a directory, perhaps; the interpreter has none then, either
        setattr(sys, standard, stream)
        setattr(sys, f"__{standard}__", stream)


def hear_interrupts(hear: bool) -> None:
    """Let Ctrl-C raise KeyboardInterrupt from here on, or hold it again; nothing where the launcher did not hold it."""
    if "pyvmm_held" in sys._xoptions:
        import _signal

        _signal.pthread_sigmask(_signal.SIG_UNBLOCK if hear else _signal.SIG_BLOCK, (_signal.SIGINT,))


def forget_current_directory() -> None:
    """With ``python -m`` modules are looked for in the current directory first, whosever it is; not from here on.

    It stays where it is ours: a checkout that was not installed.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = ""  # it has been removed
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not sys.flags.safe_path and sys.path[:1] in ([""], [here]):
        del sys.path[0]
    sys.path = [place for place in sys.path if place]
    if here == ours and here not in sys.path:
        sys.path.append(here)


def take_socket(path: str) -> int | None:
    """The descriptor of the socket that already listens at `path`, now the caller's; None if no socket does."""
    global _waits
    if _waits is None or _waits[1] != path:
        return None
    fd, _waits = _waits[0], None
    return fd


def drop_socket() -> None:
    """Close the socket and remove its file if nobody took it: the command line had a mistake; idempotent."""
    global _waits
    if _waits is not None:
        (fd, path), _waits = _waits, None
        try:
            os.unlink(path)
        except OSError:
            pass  # somebody has removed it already
        os.close(fd)


def _without(name: str, spared: dict[str, object]) -> None:
    # Import `name` with `spared` in the place of modules that it asks for; one that cannot do so gets them all.
    if gc.isenabled() or name in sys.modules:
        return  # no launch, or too late
    if "collections" in sys.modules:
        __import__("collections.abc")  # msgspec wants it as an attribute, and does not import it
    spared = {module: other for module, other in spared.items() if module not in sys.modules}
    sys.modules.update(spared)  # type: ignore[arg-type]
    try:
        __import__(name)
    except Exception:
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]
    for module, other in spared.items():
        parent, _, leaf = module.rpartition(".")
        # Since CPython 3.14 `collections` itself is what makes `collections.abc`: where the one came, the other stays.
        whole = parent in spared and getattr(sys.modules.get(parent), leaf, None) is other
        if sys.modules.get(module, spared) is other and not whole:  # else somebody needed it
            del sys.modules[module]


def _imported(name: str) -> object:
    __import__(name)
    return sys.modules[name]


class _StandIn(type(sys)):  # type: ignore[misc]  # the type of modules, without `types`
    # In the place of a module: what an import asks for in any case; the module itself for whatever else is wanted.
    __name__: str

    def __getattr__(self, name: str) -> object:
        if name[:2] == "__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(_imported(self.__name__), name)


def _module(name: str, **names: object) -> object:
    module = _StandIn(name)
    module.__dict__.update(names)
    return module


def _late(module: str, name: str) -> object:
    # A function of a module that is imported when it is called.
    return lambda *words, **more: getattr(_imported(module), name)(*words, **more)


def _class(name: str) -> type:
    return type(name, (), {})


def spare_collections(name: str) -> None:
    """Import `name` without ``collections``, of which Cython wants the abstract classes alone."""
    import _collections_abc

    collections = _module("collections", abc=_collections_abc)
    _without(name, {"collections": collections, "collections.abc": _collections_abc})


def spare_ctypes(name: str) -> None:
    """Import `name` without the half of ctypes that is in Python, from which CPython 3.14 has structures laid out."""
    if sys.version_info < (3, 14):
        return
    import _ctypes

    c_int = type("c_int", (_ctypes._SimpleCData,), {"_type_": "i"})
    ctypes = _module("ctypes", sizeof=_ctypes.sizeof, alignment=_ctypes.alignment, c_int=c_int)
    ctypes.__path__ = [f"{os.path.dirname(os.__file__)}/ctypes"]
    _without(name, {"ctypes": ctypes, "warnings": _module("warnings")})


def spare_threading() -> None:
    """Import threading without ``functools``, of which C has what is used, and ``types``, of which it is a name."""
    import _functools  # type: ignore[import-not-found]  # in no stubs

    _without("threading", {"functools": _functools, "types": _module("types", GenericAlias=type(list[int]))})


def spare_httptools() -> None:
    """Import httptools without ``typing``, which it has for annotations, and which is a fifth of the first answer."""
    nothing = type("Optional", (), {"__class_getitem__": lambda item: object})
    protocol = _module("httptools.parser.protocol", HTTPProtocol=object)
    typing = _module("typing", Optional=nothing, Protocol=object, Any=object, Union=nothing)
    _without("httptools", {"typing": typing, "httptools.parser.protocol": protocol})


def _spare_typing() -> None:
    # Of what typing imports most is for names that nobody uses: four fifths of its time, `re` and `enum` the most.
    import _collections  # type: ignore[import-not-found]  # in no stubs
    import _collections_abc
    import _functools
    import _operator

    def lru_cache(maxsize: int | None = 128, typed: bool = False) -> object:
        return lambda function: _functools._lru_cache_wrapper(function, maxsize, typed, None)

    collections = _module(
        "collections", abc=_collections_abc, defaultdict=_collections.defaultdict, deque=_collections.deque,
        OrderedDict=_collections.OrderedDict, Counter=_class("Counter"), ChainMap=_class("ChainMap"),
    )  # fmt: skip
    functools = _module(
        "functools", partial=_functools.partial, reduce=_functools.reduce, lru_cache=lru_cache, cache=lru_cache(None),
        wraps=lambda wrapped: lambda wrapper: wrapper,
    )  # fmt: skip
    contextlib = _module(
        "contextlib", AbstractContextManager=_class("AbstractContextManager"),
        AbstractAsyncContextManager=_class("AbstractAsyncContextManager"),
    )  # fmt: skip
    spared = {
        "collections": collections,
        "collections.abc": _collections_abc,
        "contextlib": contextlib,
        "functools": functools,
        "operator": _module("operator", or_=_operator.or_, getitem=_operator.getitem),
        "re": _module("re", Pattern=_class("Pattern"), Match=_class("Match")),
        "warnings": _module("warnings"),
    }
    _without("typing", spared)


def spare_msgspec() -> None:
    """Import msgspec without what it asks for and we never use, most of its time: UUIDs, decimals, enumerations.

    Dates it gets from C alone; ``re``, textwrap and its own further modules when they are asked for.
    """
    import _collections_abc
    import _datetime  # type: ignore[import-not-found]  # in no stubs; the half of datetime that is in C
    import _functools

    _spare_typing()
    safe = type("SafeUUID", (), {"unknown": None})
    spared = {
        "typing_extensions": None,  # the documented way to say that there is no such module
        "uuid": _module("uuid", UUID=_class("UUID"), SafeUUID=safe),
        "decimal": _module("decimal", Decimal=_class("Decimal")),
        "datetime": _datetime,
        "collections": _module("collections", abc=_collections_abc),
        "collections.abc": _collections_abc,
        "enum": _module("enum", EnumMeta=type("EnumMeta", (type,), {})),
        "functools": _module("functools", partial=_functools.partial),  # for enum, which CPython 3.14 needs here
        "re": _module("re", compile=_late("re", "compile")),
    }
    spared |= {name: _module(name) for name in (f"msgspec.{each}" for each in ("inspect", "msgpack", "toml", "yaml"))}
    schema = "msgspec._json_schema"
    spared[schema] = _module(schema, **{name: _late(schema, name) for name in ("schema", "schema_components")})
    _without("msgspec", spared)


def finish_start() -> None:
    """The start is over: what there is will stay, what comes is looked through for garbage as ever; idempotent."""
    if not gc.isenabled():
        if _Site in sys.meta_path:  # behind a filter or in a jail there is nothing to be found
            sys.meta_path.remove(_Site)
        gc.freeze()
        gc.enable()
