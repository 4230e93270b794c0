"""Register our quantizer with transformers as soon as transformers is there, without importing it.

`import aqtx` must stay fast, so nothing heavy is imported here. If transformers' quantizers are
loaded already, ours joins them at once; otherwise it joins right after they are first imported.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

WATCHED = "transformers.quantizers.auto"
OURS = "aqtx.checkpoint.huggingface.quantizer"


def install() -> None:
    """Register now or later; safe to call again."""
    if WATCHED in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


class AfterImport(MetaPathFinder):
    """Finds the watched module as usual, with a loader that registers ours behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec with our loader, for the watched module only."""
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Registering(spec.loader)
        return spec


class Registering(Loader):
    """Runs the module's own loader, then imports our quantizer, which registers itself."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then ours."""
        self.loader.exec_module(module)
        importlib.import_module(OURS)
