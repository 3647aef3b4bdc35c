"""Finds plugins: one module of a package is one plugin, and the module's name is the plugin's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from types import ModuleType
from typing import TypeVar

GROUP = "timmy_dispatch.plugins"

T = TypeVar("T")


def discover(package: ModuleType, kind: type[T]) -> Iterator[tuple[str, T]]:
    """Yields `(stem, plugin)` in sorted order for each module of `package` whose name does not start with `_`.

    A module without a `plugin` of that kind raises TypeError naming both. Plugins of other distributions come from the entry-point
    group `timmy_dispatch.plugins`, named `<package>.<stem>`.
    """
    found: dict[str, T] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        name = f"{package.__name__}.{info.name}"
        found[info.name] = _plugin(importlib.import_module(name), name, kind)
    prefix = package.__name__ + "."
    for entry in _installed():
        if entry.name.startswith(prefix):
            found[entry.name.removeprefix(prefix)] = _check(entry.load(), entry.value, kind)
    yield from sorted(found.items())


@cache
def _installed() -> EntryPoints:
    """What other distributions bring; to ask reads the metadata of every one."""
    return entry_points(group=GROUP)


def _plugin(module: ModuleType, name: str, kind: type[T]) -> T:
    return _check(getattr(module, "plugin", None), name, kind)


def _check(plugin: object, name: str, kind: type[T]) -> T:
    if not isinstance(plugin, kind):
        raise TypeError(f"{name} must define `plugin`, a {kind.__name__}; it has {type(plugin).__name__}")
    return plugin
