"""The checkpoint's tensors of one vLLM linear: loaded shard by shard, counted, and checked."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from msp_plugin.errors import FormatError, ServingError
from msp_plugin.formats.sparse24 import SUFFIXES

#: A linear of vLLM. Parameters, loaders and our own notes stand on it as attributes, for which it declares no
#: types.
Linear = Any
#: vLLM's names of the shards of a fused attention projection, by position.
_ATTENTION = {"q": 0, "k": 1, "v": 2}


class Shards:
    """The layers of the checkpoint that vLLM fuses into one linear, and which of their tensors have come.

    Args:
        prefix: vLLM's name of the linear.
        names: the checkpoint's names of the layers, in the order of their rows.
        packed: for each of them, whether the checkpoint holds it packed.
        suffixes: of the tensors that stand for a packed weight.
    """

    def __init__(
        self,
        prefix: str,
        names: tuple[str, ...],
        packed: tuple[bool, ...],
        suffixes: tuple[str, ...] = SUFFIXES,
    ):
        self.prefix, self.names, self.packed, self.suffixes = prefix, names, packed, suffixes
        self._loaders: set[Callable[..., None]] = set()
        self._loaded: dict[str, set[int]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def expect_parts(self, count: int) -> None:
        """Check that each layer is a part; a single layer of several parts is fused in the checkpoint.

        Raises:
            ServingError: it has not.
        """
        if len(self.names) == 1:
            self.names, self.packed = self.names * count, self.packed * count
        if count != len(self.names):
            raise ServingError(
                f"{self.prefix} is made of {count} parts, known are {', '.join(self.names)}",
                hint="this model class is fused in a way that msp_plugin does not know",
            )

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The layers that the checkpoint holds packed, each once."""
        return tuple(dict.fromkeys(n for n, packed in zip(self.names, self.packed, strict=True) if packed))

    @property
    def any_loaded(self) -> bool:
        """True if a tensor came since the last ``forget``."""
        return bool(self._loaded)

    def forget(self) -> None:
        """Count anew: the next tensors belong to a reload."""
        self._loaded, self._shapes = {}, {}

    def counted(self, layer: Linear, suffix: str, loader: MethodType) -> MethodType:
        """Return the layer's loader of ``<layer>.<suffix>``, which also counts, as a method of the layer.

        vLLM keeps copies of parameters for reloads and unbinds the methods in them; a function that held the
        layer would keep it alive for ever.
        """
        unbound = loader.__func__

        def load(
            layer: Linear, param: torch.nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: Any = None
        ) -> None:
            self._load(suffix, MethodType(unbound, layer), param, loaded_weight, loaded_shard_id)

        self._loaders.add(load)
        return MethodType(load, layer)

    def _load(
        self,
        suffix: str,
        loader: Callable[..., None],
        param: torch.nn.Parameter,
        loaded: torch.Tensor,
        shard: Any,
    ) -> None:
        """Load one tensor of the checkpoint into its place, and note that it came."""
        indices, parts = self._indices(shard), self.parts(shard)
        names = ", ".join(parts)
        try:
            loader(param, loaded, shard) if shard is not None else loader(param, loaded)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            raise FormatError(
                f"{names}.{suffix} {list(loaded.shape)} does not fit into {self.prefix}.{suffix} "
                f"{list(param.shape)}: {error or 'other shape'}",
                hint="the file is damaged, or config.json is from another model",
            ) from error
        self._loaded.setdefault(suffix, set()).update(indices)
        if len(parts) == 1:
            shape = tuple(loaded.reshape(-1).tolist()) if suffix == "shape" else tuple(loaded.shape)
            self._shapes.setdefault(parts[0], {})[suffix] = shape

    def parts(self, shard: Any) -> tuple[str, ...]:
        """Return the names of the layers in one tensor of the checkpoint, by vLLM's name of the shard."""
        return tuple(dict.fromkeys(self.names[i] for i in self._indices(shard)))

    def _indices(self, shard: Any) -> tuple[int, ...]:
        """Return the positions of the layers in one tensor of the checkpoint; all if it is fused there."""
        if shard is None:
            return tuple(range(len(self.names)))
        if isinstance(shard, tuple):
            return shard
        if isinstance(shard, str) and shard not in _ATTENTION:
            raise ServingError(
                f"{self.prefix} has a part {shard!r}, known are {', '.join(_ATTENTION)}",
                hint="this model class is fused in a way that msp_plugin does not know",
            )
        return (_ATTENTION[shard] if isinstance(shard, str) else shard,)

    def check(self, layer: Linear) -> None:
        """Raise unless every tensor of every layer came, in shapes that agree.

        Raises:
            FormatError: a tensor never came, or its shape does not fit.
        """
        bias = ("bias",) if getattr(layer, "bias", None) is not None else ()
        for index, (name, packed) in enumerate(zip(self.names, self.packed, strict=True)):
            for suffix in (*(self.suffixes if packed else ("weight",)), *bias):
                if not self._replaced(layer, suffix) and index not in self._loaded.get(suffix, ()):
                    raise FormatError(
                        f"{name}.{suffix} is not in the checkpoint (part of {self.prefix})",
                        hint="a file is missing or damaged: export or download it anew",
                    )
        for name, shapes in self._shapes.items():
            if self.suffixes == SUFFIXES and SUFFIXES[0] in shapes:
                self._check_shapes(layer, name, *(shapes[suffix] for suffix in SUFFIXES))

    def _replaced(self, layer: Linear, suffix: str) -> bool:
        """Return True if the model class put its own loader in the place of ours, which counts."""
        loader = getattr(getattr(layer, suffix, None), "weight_loader", None)
        return getattr(loader, "__func__", None) not in self._loaders

    def _check_shapes(
        self,
        layer: Linear,
        name: str,
        compressed: tuple[int, ...],
        bitmask: tuple[int, ...],
        shape: tuple[int, ...],
    ) -> None:
        """Raise unless the shapes of a packed layer's tensors agree with each other and with vLLM's layer.

        vLLM's loaders take their share of a tensor that has more rows, and say nothing.
        """
        rows, columns = compressed[0], 2 * compressed[1]
        if shape != (rows, columns):
            raise FormatError(
                f"{name}.shape says {list(shape)}, its values are those of [{rows}, {columns}]",
                hint="the file is damaged: export or download it anew",
            )
        self.check_size(layer, name, (rows, columns), bitmask)

    def check_size(
        self, layer: Linear, name: str, size: tuple[int, int], bitmask: tuple[int, ...] | None = None
    ) -> None:
        """Raise unless a packed layer [O, I] is as large as vLLM's layer takes it, and its bitmask as wide.

        Args:
            bitmask: its shape, if it is to be [O, I / 8].

        Raises:
            FormatError: it is not.
        """
        rows, columns = size
        parts = [r for r, n in zip(layer.sparse24_rows, self.names, strict=True) if n == name]
        here, tp = sum(parts), getattr(layer, "tp_size", 1)
        # Each process holds one of so many shares: tp, or fewer where key and value heads are replicated.
        shares, rest = divmod(rows, here)
        whole = len(parts) > 1 or (rest == 0 and shares > 0 and tp % shares == 0)
        fits = bitmask is None or bitmask == (rows, columns // 8)
        if not whole or columns != layer.sparse24_columns or not fits:
            note = "" if bitmask is None else f" with a bitmask {list(bitmask)}"
            raise FormatError(
                f"{name} is stored as [{rows}, {columns}]{note}; it does not fit "
                f"into {self.prefix}, which takes [{here}, {layer.sparse24_columns}] of it in each process",
                hint="the file is damaged, or config.json is from another model",
            )
