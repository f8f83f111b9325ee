"""Looped language models on Megatron-core: one stack of blocks, run several times with the same weights."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Megatron-core prints these at every start without Apex and Transformer Engine, and about its own use of deprecated
# names. Nothing can be done about them here; docs/engine.md says what is missing without a GPU.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)

# Module paths that the README of 0.1 used, so that scripts written then still run.
_MOVED = {
    "looplm.parallel": "looplm.megatron.process_groups",
    "looplm.exit_gate": "looplm.model.exit_gate",
    "looplm.inference.generate": "looplm.inference.generator",
}


class _MovedModules(MetaPathFinder, Loader):
    """Finder that imports a moved module from its new path, with a warning."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} has moved; import {new} instead", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)  # importlib returns the entry that it finds here


sys.meta_path.append(_MovedModules())  # last, so that it is asked only for modules that do not exist
