"""The source of a run's model, from which each step of the run loads a fresh copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msp_plugin.checkpoint.load import load
from msp_plugin.checkpoint.quantized import check_source_unquantized
from msp_plugin.demo import given_name
from msp_plugin.errors import ModelError, MSPError
from msp_plugin.models.device import warn_if_slow
from msp_plugin.models.source import load_tokenizer
from msp_plugin.runtime.files import expanded
from msp_plugin.structure.small_model import empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSource:
    """A model directory or hub id, and how to load it.

    Args:
        name: directory or hub id.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run the model repository's code.
        offload: leave the weights on disk, for models larger than memory (see load_model).
        cache: where offloaded weights that change are written; None is the default cache.
    """

    name: str | Path
    dtype: str = "auto"
    trust_remote_code: bool = False
    offload: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str | Path):
            raise ModelError(
                f"the model is a {type(self.name).__name__}",
                hint="give its directory or hub id; a model in memory is pruned by oneshot with MixedSparsityModifier",
            )
        if str(self.name).startswith("~"):
            object.__setattr__(self, "name", expanded(self.name))

    @property
    def spelled(self) -> str:
        """The name for records: a directory's absolute path, a hub id, or ``demo:NAME`` of an embedded model."""
        path = Path(self.name)
        return given_name(path.absolute() if path.is_dir() else self.name)

    def check(self) -> None:
        """Raise ModelError if the source is missing or quantized; nothing is loaded."""
        check_source_unquantized(self.name, trust_remote_code=self.trust_remote_code)

    def empty(self) -> PreTrainedModel | None:
        """Return the model without weights (on ``meta``); None where its config does not suffice.

        That is so for packed models, and for smaller ones of the hub, whose shapes are read from a directory only.
        """
        try:
            model = empty_model(self.name, trust_remote_code=self.trust_remote_code)
        except MSPError:
            return None
        elsewhere = getattr(model.config, "is_heterogeneous", False) and not Path(self.name).is_dir()
        return None if elsewhere or getattr(model.config, "quantization_config", None) else model

    def load(self) -> PreTrainedModel:
        """Return the model, in eval mode on the CPU or on disk; see ``load`` for the errors.

        A dtype that nobody asked for by name and that is slow here is warned of.
        """
        model = load(
            self.name,
            self.dtype,
            trust_remote_code=self.trust_remote_code,
            offload=self.offload,
            cache=self.cache,
        )
        if self.dtype == "auto":
            warn_if_slow(model)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            ModelError: there is none.
        """
        return load_tokenizer(self.name, trust_remote_code=self.trust_remote_code)
