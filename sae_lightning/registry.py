"""Names that a package may add to, the modules that add them, and the sentence for a name that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, TypeVar

PLUGINS = "sae_lightning.plugins"  # an entry point of packages whose modules add to ours when they are imported
T = TypeVar("T")


def one_of(value: T, known: Iterable[object], setting: str, error: type[ValueError] = ValueError) -> T:
    """``value`` itself; an ``error`` that names the ``setting`` unless it is one of the ``known``."""
    known = list(known)
    if value not in known:
        raise error(f"Unknown {setting}={value}; choose one of {', '.join(map(str, known))}.")
    return value


class Registry(dict[str, T]):
    """Objects by the names that ``setting`` takes.

    A name that is not there is looked for among the plugins, then refused in a sentence (an ``error``), and so is one
    that is taken. ``in`` and ``get`` ask only for what has been added.
    """

    def __init__(self, setting: str, error: type[ValueError] = ValueError) -> None:
        super().__init__()
        self.setting, self.error = setting, error

    def __missing__(self, name: str) -> T:
        import_plugins()
        return self.get(one_of(name, self, self.setting, self.error))  # type: ignore[return-value]

    def add(self, name: str, made: T) -> T:
        """Add ``made``; a module that is imported anew may replace its own."""
        before = self.get(name, made)
        if _origin(before) != _origin(made):
            raise self.error(f"{self.setting}={name} is taken by {'.'.join(_origin(before))}; choose another name.")
        self[name] = made
        return made

    def __call__(self, name: str) -> Callable[[T], T]:
        """A decorator that adds a function or a class under ``name``."""
        return lambda made: self.add(name, made)


def _origin(made: Any) -> tuple[str, str]:
    made = getattr(made, "compute", made)  # a metric's part is its function's
    return made.__module__, made.__qualname__


def discover(package: str) -> None:
    """Import every module of the folder ``package``, so that each adds what it has."""
    for module in iter_modules(import_module(package).__path__, f"{package}."):
        import_module(module.name)


def import_plugins() -> None:
    """Import the modules that installed packages name as plugins; ValueError with a sentence where one cannot be."""
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:
            raise ValueError(
                f"The plugin {plugin.name} ({plugin.value}) cannot be imported: {type(error).__name__}: {error}. Mend "
                "or uninstall its package."
            ) from error
