"""Register the modifier when llm-compressor is imported. `msp enable` runs this at interpreter start.

It imports nothing but sys until then, so it costs an interpreter that never uses llm-compressor next
to nothing.
"""

import sys


class _Loader:
    """The package's own loader; registers the modifier after the package has run."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
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

    def find_spec(self, name, path=None, target=None):
        if name != "llmcompressor" or self.asking:
            return None
        import importlib.util

        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install():
    """Put the finder first, once."""
    if not any(type(finder).__name__ == _Finder.__name__ and type(finder).__module__ == __name__
               for finder in sys.meta_path):  # fmt: skip
        sys.meta_path.insert(0, _Finder())


install()
