"""Register the modifier when llm-compressor is imported. `msp enable` runs this at interpreter start.

It imports nothing but sys until then, so it costs an interpreter that never uses llm-compressor next
to nothing.
"""

import sys

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class _Loader:
    """The package's own loader; registers the modifier after the package has run."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        assert module.__spec__ is not None  # the import system has set it
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            from msp_plugin.hosts.llm_compressor.register import register_modifier

            register_modifier()
        except Exception as error:
            import warnings

            warnings.warn(
                f"msp_plugin could not register MixedSparsityModifier: {type(error).__name__}: {error}; "
                "run `msp doctor`, or `msp disable` to stop trying",
                RuntimeWarning,
                stacklevel=2,
            )


class _Finder:
    """Finds llm-compressor as the other finders do, and wraps its loader."""

    asking = False

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != "llmcompressor" or self.asking:
            return None
        import importlib.util

        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment] # importlib.abc is not imported for it
        return spec


def install() -> None:
    """Put the finder first, once."""
    finders = [(type(finder).__module__, type(finder).__name__) for finder in sys.meta_path]
    if (__name__, _Finder.__name__) not in finders:
        sys.meta_path.insert(0, _Finder())


install()
