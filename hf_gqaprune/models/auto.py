"""Register the pruned Llama with transformers' Auto classes as soon as, but not before, these are imported."""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_CONFIGURATION = f"{__package__}.configuration_pruned_llama"
_AUTO = "transformers.models.auto"


class _LazyClasses(UserDict[Any, Any]):
    """A mapping whose classes may be given as `file.Class` and are imported when looked up.

    Importing them at once would fail: transformers imports the Auto classes halfway through what they are built on.
    """

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, str):
            file, _, name = value.partition(".")
            value = self.data[key] = getattr(import_module(f"{__package__}.{file}"), name)
        return value


def _add(mapping: Any, key: Any, path: str) -> None:
    mapping._extra_content = _LazyClasses(mapping._extra_content)
    mapping.register(key, path, exist_ok=True)


def _register_config() -> None:
    mapping = sys.modules[f"{_AUTO}.configuration_auto"].CONFIG_MAPPING
    _add(mapping, "pruned_llama", "configuration_pruned_llama.PrunedLlamaConfig")


def _register_models() -> None:
    configuration: Any = sys.modules.get(_CONFIGURATION)
    modeling_auto = sys.modules.get(f"{_AUTO}.modeling_auto")
    # each may import the other; whichever is complete last registers
    if modeling_auto is not None and hasattr(configuration, "PrunedLlamaConfig"):
        for auto_name, path in configuration.AUTO_MAP.items():
            if auto_name != "AutoConfig":
                _add(getattr(modeling_auto, auto_name)._model_mapping, configuration.PrunedLlamaConfig, path)


_HOOKS: dict[str, Callable[[], None]] = {
    f"{_AUTO}.configuration_auto": _register_config,
    f"{_AUTO}.modeling_auto": _register_models,
    _CONFIGURATION: _register_models,
}


class _Finder(MetaPathFinder):
    """Run a hook after the import of its module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _HOOKS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _HOOKS[name]()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register config and models with the Auto classes, now if transformers has imported these, else once it does."""
    for name, hook in _HOOKS.items():
        if name in sys.modules:
            hook()
    sys.meta_path.insert(0, _Finder())
