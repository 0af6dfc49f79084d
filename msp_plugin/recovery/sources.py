"""Open a sparse checkpoint and the dense model that it was pruned from, and check both before any work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import SOURCE_ALLOCATION_FILE
from msp_plugin.checkpoint.quantized import check_source_unquantized
from msp_plugin.checkpoint.recount import recount_model
from msp_plugin.checkpoint.saving import check_savable
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.errors import ModelError
from msp_plugin.models.layers import check_finite_weights, fused_experts, prunable_layers
from msp_plugin.models.offload import input_embeddings, named_parameters, onloaded
from msp_plugin.models.weights import Weights
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation
from msp_plugin.records.run import RECIPE_FILE, RUN_FILE, RunRecord
from msp_plugin.recovery.base import Recovery
from msp_plugin.recovery.masks import Masks
from msp_plugin.runtime.disk import check_free
from msp_plugin.runtime.files import expanded
from msp_plugin.structure.widths import Widths, global_widths, read_widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Entries of a config that a model and its original share, and those that are less in one that lost heads, channels or
#: blocks.
_SAME = ("vocab_size", "hidden_size")
_DEPTH = "num_hidden_layers"
_LESS = ("intermediate_size", _DEPTH, "num_attention_heads", "num_key_value_heads")


#: The records of a run that its recovery keeps.
RECORDS = (ALLOCATION_FILE, SOURCE_ALLOCATION_FILE, RUN_FILE, RECIPE_FILE)


@dataclass(frozen=True)
class Sparse:
    """A loaded sparse checkpoint: its model, its zeros, and the allocation and run.json beside it, if any."""

    model: PreTrainedModel
    masks: Masks
    allocation: Allocation | None
    record: RunRecord | None


def load_sparse(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, out: Path, *, smaller: bool = False
) -> Sparse:
    """Return a sparse checkpoint after all checks. Its layers are those of its allocation.json, if there is one.

    Args:
        smaller: see Sources.

    Raises:
        ModelError: it is dense, or cannot be saved again.
        VerificationError: its allocation.json is of another model.
        RecipeError: its run.json is damaged, or of a newer version.
        OutputError: the disk of ``out`` has too little room.
    """
    folder, allocation = records_folder(source.name), None
    record = RunRecord.beside(folder)
    if (folder / ALLOCATION_FILE).is_file():
        if expanded(source.name).is_dir():
            assert Checkpoint.open(folder).allocation is not None  # compares it with the tensors
        allocation = Allocation.read(folder / ALLOCATION_FILE)
    model = source.load()
    table = prunable_layers(model)
    check_finite_weights(model, table)
    pruned = {layer.name for layer in table.layers} if allocation is None else allocation.by_layer
    masks = Masks.of(model, [layer.name for layer in table.layers if layer.name in pruned], smaller=smaller)
    if allocation is not None:
        recount_model(model, allocation, exact=False, after="loading")
    check_savable(model, tokenizer)
    size = sum(p.numel() * p.element_size() for _, _, p in named_parameters(model))
    check_free(out, size, "the recovered model takes", "give an output directory on another disk")
    return Sparse(model, masks, allocation, record)


def records_folder(run: str | Path) -> Path:
    """Return the directory with the records of a run; those of a hub id are fetched from the hub or its cache."""
    path = expanded(run)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(run), allow_patterns=list(RECORDS)))
    except Exception as error:  # a connection raises many types; the model may be in the cache alone
        log.warning("the records of %s cannot be read, so that the result has none of them: %s", run, error)
        return path


def load_original(source: ModelSource, model: PreTrainedModel, *, smaller: bool = False) -> PreTrainedModel:
    """Return the dense model of a sparse one.

    Args:
        smaller: see Sources.

    Raises:
        ModelError: it has other parameters or other shapes, but where ``smaller`` allows that.
    """
    original = source.load()
    shapes, expected = (
        {name: tuple(p.shape) for name, _, p in named_parameters(m)} for m in (original, model)
    )
    if shapes != expected and fused_experts(original) and not fused_experts(model):
        raise ModelError(
            f"the experts of {source.name} are fused, and those of the model apart, as oneshot prunes them",
            hint="a recovery cannot compare the two yet: leave it out for this model",
        )
    for name in expected.keys() - shapes.keys():
        if name.endswith(".bias"):  # those of an earlier mean_update
            del expected[name]
    if shapes != expected and not smaller:
        names = sorted({*shapes, *expected}, key=lambda name: (shapes.get(name) == expected.get(name), name))
        raise ModelError(
            f"{source.name} is not the original of this model: {names[0]} is "
            f"{shapes.get(names[0], 'missing')}, expected {expected.get(names[0], 'no such parameter')}",
            hint="give the dense model that was pruned",
        )
    embeddings = []
    for module in map(input_embeddings, (original, model)):
        with onloaded(module):
            embeddings.append(module.get_parameter("weight").detach().cpu().float())
    own, other = embeddings
    if not torch.allclose(own, other, rtol=2**-7, atol=2**-14):  # stored in another type, one is rounded
        log.warning(
            "the embeddings of %s differ from the sparse model's: is it the model that was pruned?",
            source.name,
        )
    return original


def check_denser(
    name: str | Path,
    original: PreTrainedModel,
    masks: Masks,
    hint: str = "give the dense model that was pruned",
) -> None:
    """Raise if an original has the zeros of the sparse model, so that there is nothing to learn from it.

    Raises:
        ModelError: in each layer whose shape it shares, all that is zero in the sparse model is zero in it.
    """
    weights = Weights(original)
    shared = [layer for layer, shape in masks.shapes.items() if tuple(weights[layer].shape) == shape]
    zeros = False
    for layer in shared:
        gone = ~masks.kept(layer)
        zeros = zeros or bool(gone.any())
        if bool((weights[layer].detach().cpu()[gone] != 0).any()):
            return
    if zeros and len(shared) == len(masks.shapes):
        raise ModelError(f"{name} has all the zeros of the model that is to be recovered", hint=hint)


@dataclass(frozen=True)
class Sources:
    """A sparse model and its original after the checks that need no weights.

    Args:
        smaller: the sparse model has less of something than the original, or has blocks of their own widths: what is
            left is not held against the original's shapes.
    """

    tokenizer: PreTrainedTokenizerBase
    smaller: bool


def check_sources(sparse: ModelSource, dense: ModelSource | None, recovery: Recovery) -> Sources:
    """Return the tokenizer of a sparse model and if it is a smaller one, after all checks that need no weights.

    Raises:
        ModelError: a source is missing or quantized, the original's config or tokenizer differs, or the recovery needs
            models of the same depth or layers of the same shapes.
    """
    hint = "recover the sparse model before its quantization, and quantize the result"
    check_source_unquantized(sparse.name, trust_remote_code=sparse.trust_remote_code, hint=hint)
    tokenizer, own = sparse.tokenizer(), _config(sparse)
    widths = read_widths(own, str(sparse.name)) or ()
    if dense is None:
        return Sources(tokenizer, bool(widths))
    dense.check()
    other = _config(dense)
    less = [key for key in _LESS if (own.get(key) or 0) < (other.get(key) or 0)]
    odd = [key for key in _SAME if own.get(key) != other.get(key)]
    odd += [key for key in _LESS if key not in less and own.get(key) != other.get(key)]
    # A smaller Llama may be written as a Mistral, a Qwen2 as a Seed-OSS.
    if not less and own.get("model_type") != other.get("model_type"):
        odd.insert(0, "model_type")
    for key in odd:
        raise ModelError(
            f"{dense.name} is not the original of {sparse.name}: {key} is {other.get(key)}, expected {own.get(key)}",
            hint="give the dense model that was pruned",
        )
    if recovery.same_depth and _DEPTH in less:
        raise ModelError(
            f"{sparse.name} has {own[_DEPTH]} blocks and its original {other[_DEPTH]}, so {recovery.name} cannot hold them "
            "side by side",
            hint="use lora or full, which compare outputs, or export the model to small, which keeps empty blocks",
        )
    if recovery.same_shapes and (less or (widths and _narrows(widths, global_widths(own)))):
        raise ModelError(
            f"{sparse.name} lost heads or channels, and {recovery.name} compares layers of one shape",
            hint="use another recovery (see `msp plugins`), or recover the model before its export",
        )
    if dense.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{dense.name} has another tokenizer than {sparse.name}",
            hint="give the dense model that was pruned",
        )
    return Sources(tokenizer, bool(widths or less))


def _narrows(widths: Sequence[Widths], usual: Widths) -> bool:
    """Return True if a block lost some of its heads or channels, but not all of them."""
    pairs = (pair for own in widths for pair in zip(astuple(own), astuple(usual), strict=True))
    return any(size not in (0, whole) for size, whole in pairs)


def _config(source: ModelSource) -> dict[str, Any]:
    """Return the entries of a model's config, of its language part."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.name, trust_remote_code=source.trust_remote_code)
    return dict(config.get_text_config(decoder=True).to_dict())
