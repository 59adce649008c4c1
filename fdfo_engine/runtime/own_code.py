"""A user's own code: `module:attribute` or `file.py:attribute`, from the working folder or the config's.

Only what a config or a command names is imported, never what a checkpoint or a client names, and a line says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import FdfoError, UsageError
from fdfo_engine.runtime.failures import Failure

_more_folders: list[Path] = []


def search_in(*folders: Path) -> None:
    """Looks for modules and files there too, after Python's own path and the working folder: the config's folder."""
    for folder in folders:
        if (resolved := folder.resolve()) not in _more_folders:
            _more_folders.append(resolved)


def more_folders() -> list[Path]:
    """What `search_in` was given."""
    return list(_more_folders)


def named_by(where: str, name: str) -> str:
    """How a message begins: a setting with its value, or an option of the command line with what was given."""
    return f"{where} {name}" if where.startswith("--") else f"{where} = {name!r}"


def own_callable(name: str, where: str) -> Callable[..., Any]:
    """What `name` says: `module:attribute`, or `file.py:attribute`.

    Raises:
        UsageError: it cannot be imported or called; `where` is the setting or option that the message names.
    """
    source, _, attribute = name.rpartition(":")
    try:
        module = _from_file(source, where) if source.endswith(".py") else _from_path(source)
    except FdfoError:
        raise
    except Exception as error:
        failure = Failure.of(error)
        raise UsageError(f"{named_by(where, name)}: {failure}{_searched(source, error)}") from error
    target = getattr(module, attribute, None)
    if target is None:
        raise UsageError(
            f"{named_by(where, name)}: {_file_of(module)} has no {attribute!r}{_other_file(source, module)}"
        )
    if not callable(target):
        raise UsageError(f"{named_by(where, name)}: is a {type(target).__name__}, takes something to call")
    found: Callable[..., Any] = target
    return found


def _from_path(module: str) -> ModuleType:
    """A module of Python's path, or of one of our folders, which then joins the end of the path."""
    top = module.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        for folder in _folders():
            if (folder / f"{top}.py").is_file() or (folder / top).is_dir():
                _join_path(folder)
                break
    if module not in sys.modules and (place := _place_of(top)) is not None:
        _announce(module, place)
    return importlib.import_module(module)


def _from_file(source: str, where: str) -> ModuleType:
    """The module in a file, under its own name where that is free."""
    given = Path(source).expanduser()
    candidates = [given] if given.is_absolute() else [folder / given for folder in _folders()]
    file = next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
    if file is None:
        looked = ", ".join(str(candidate) for candidate in candidates)
        raise UsageError(f"{named_by(where, source)}: no such file; looked for {looked}")
    return _module_of_file(file)


@functools.cache
def _module_of_file(file: Path) -> ModuleType:
    _announce(file.stem, str(file))
    _join_path(file.parent)
    name = file.stem if _place_of(file.stem) == str(file) else f"own_{file.stem}_{zlib.crc32(bytes(file)):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _folders() -> list[Path]:
    return list(dict.fromkeys([Path.cwd(), *_more_folders]))


def _join_path(folder: Path) -> None:
    """At its end: nothing in the folder hides what is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def _place_of(module: str) -> str | None:
    """The file, or the folder of a package without one, that `import module` would read; None where there is none."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def _announce(module: str, file: str) -> None:
    if multiprocessing.parent_process() is None:  # a reward's own process: its parent has said so
        say(f"will import {module} from {file}, as the settings say")


def _searched(source: str, error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError) or error.name != source.partition(".")[0]:
        return ""
    folders = ", ".join(str(folder) for folder in _folders())
    return f"; looked on Python's path and in {folders}; takes module:attribute or ./file.py:attribute"


def _other_file(source: str, module: ModuleType) -> str:
    """A hint where another module of the same name came first."""
    for folder in _folders():
        file = folder / f"{source}.py"
        if file.is_file() and str(file.resolve()) != getattr(module, "__file__", None):
            return f"; for {file} take ./{source}.py:ATTRIBUTE"
    return ""


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__
