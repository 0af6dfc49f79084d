"""Hold offloaded modules in memory for a while, and let them read changed tensors from a file afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from msp_plugin.models.offload import offload_hook


@contextmanager
def held(modules: Iterable[torch.nn.Module], *, writable: bool = False) -> Iterator[None]:
    """Hold in memory, in the block, the weights of modules and their parts that accelerate offloads.

    Modules that are in memory anyway are left alone. Changes are lost at the end (see ``read_from``).

    Args:
        writable: the weights may be changed in place; those that accelerate maps from files must not be.
    """
    hooks = {part: offload_hook(part) for module in modules for part in module.modules()}
    hooks = {part: hook for part, hook in hooks.items() if hook is not None}
    loaded = []
    try:
        for part, hook in hooks.items():
            hook.pre_forward(part)
            hook.offload = False
            loaded.append((part, hook))
            for parameter in part.parameters(recurse=False) if writable else ():
                parameter.data = parameter.data.clone()
        yield
    finally:
        for part, hook in loaded:
            hook.offload = True
            hook.post_forward(part, None)


def read_from(model: torch.nn.Module, file: Path, names: Iterable[str]) -> None:
    """Let offloaded modules read some of their parameters from a safetensors file, which must stay.

    Args:
        names: full names of parameters, as in the file; those in memory are left alone.
    """
    leaves: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, {})[leaf] = name
    for name, replaced in leaves.items():
        hook = offload_hook(model.get_submodule(name))
        if hook is not None:
            hook.weights_map = _Replaced(hook.weights_map, file, replaced)
            hook.tied_params_map = {}  # found by address, and a read tensor may get the address of a freed one


class _Replaced(Mapping[str, torch.Tensor]):
    """The tensors of a module by name, some of them from another file."""

    def __init__(self, own: Mapping[str, torch.Tensor], file: Path, names: Mapping[str, str]):
        self.own, self.file, self.names = own, file, names

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self.names:
            return self.own[key]
        with safe_open(self.file, "pt") as saved:
            tensor: torch.Tensor = saved.get_tensor(self.names[key])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)
