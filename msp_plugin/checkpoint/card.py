"""The model card of an export: what it is, how to load and serve it."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from msp_plugin.checkpoint.packing import short_reason
from msp_plugin.records.run import DENSE, RunRecord
from msp_plugin.structure.widths import KEY

if TYPE_CHECKING:
    from msp_plugin.checkpoint.checkpoint import Checkpoint
    from msp_plugin.checkpoint.manifest import Manifest
    from msp_plugin.formats.base import PackedFormat

_FRONT = """---
library_name: transformers
tags: [pruned, sparsity, {tag}]
---
"""


def model_card(source: Checkpoint, manifest: Manifest, format: PackedFormat | None = None) -> str:
    """Return the card's Markdown. The same checkpoint gives the same text.

    Args:
        source: the checkpoint that was exported.
        format: the format of the packed layers; None for a dense export.
    """
    before = source.manifest.structure if source.manifest else {}
    if manifest.structure and manifest.structure != before:
        return _smaller_card(source, manifest)
    smaller, tag, how = source.smaller, '"N:M"', "mixed N:M sparsity"
    if format is not None and format.structure == "2:4":
        tag = '"2:4"'
    elif format is None and not _has_masks(source):
        tag, how = "structured", "heads, channels or halves gone"
    parts = [
        _FRONT.format(tag=tag),
        f"# {(source.config.get('architectures') or ['A model'])[0]}, pruned with {how}\n",
        _LEFT_OUT.format("`export.json`" if manifest.structure else "`config.json`") if smaller else "",
        _contents(source, manifest, format),
        (_SMALL_USE if KEY in source.config else _UNIFORM_USE)
        if smaller and format is None
        else _use(source, format),
        _levels(source),
        _recovered(source),
        "Files, as far as they are there: `allocation.json` gives the level of each layer, `export.json` what the "
        "files must hold (`msp verify` checks both), `run.json` the record of the run that pruned the model.\n",
    ]
    return "\n".join(part for part in parts if part)


def _smaller_card(source: Checkpoint, manifest: Manifest) -> str:
    """Return the card of a smaller model: heads, channels and halves that did nothing are left out."""
    own = manifest.format == "small"
    kept = sum(math.prod(shape) for shape in manifest.tensors.values())
    weights = sum(math.prod(source.dense_info(name).shape) for name in source.dense_names)
    dropped = sum(not entry["kept"] for entry in manifest.structure.values())
    return "\n".join(
        part
        for part in [
            _FRONT.format(tag="structured"),
            f"# {(source.config.get('architectures') or ['A model'])[0]}, pruned to smaller layers\n",
            f"{kept:,} of {weights:,} weights: heads and channels that did nothing are left out, and {dropped} of "
            f"{len(manifest.structure)} attentions and MLPs. `export.json` says which ones stay.\n",
            _SMALL_USE if own else _UNIFORM_USE,
            _recovered(source),
            "Files: `export.json` gives what the files must hold (`msp verify` checks it), `run.json` the record of the "
            f"run that pruned the model{', `per_layer_config` in config.json the width of each block' if own else ''}.\n",
        ]
        if part
    )


def _use(source: Checkpoint, format: PackedFormat | None) -> str:
    """Return how to load and serve the export; empty for a quantized one, which other tools load."""
    if format is not None:
        return (_SERVED_USE if format.served else "## Use it\n\n") + _PACKED_USE
    if source.quantization is not None:
        return ""
    kind = "ImageTextToText" if "vision_config" in source.config else "CausalLM"
    return _DENSE_USE.replace("AUTO_CLASS", f"AutoModelFor{kind}")


def _contents(source: Checkpoint, manifest: Manifest, format: PackedFormat | None) -> str:
    """Return the paragraph on the format, its bytes, and why layers stay dense."""
    if format is None and source.quantization is not None:
        return "The weights are quantized as config.json says; the pruned ones are zeros.\n"
    if format is None:
        return "The weights are plain dense safetensors; the pruned ones are zeros.\n"
    ratio = manifest.packed_bytes / manifest.dense_bytes
    owner = (
        f"format `{format.name}` of msp_plugin"
        if format.lossy
        else f"compressed-tensors format `{format.name}`"
    )
    lines = [
        f"{len(manifest.packed)} layers are stored in the {owner}: "
        f"{format.description}, {ratio:.4f} of their dense bytes "
        f"({manifest.packed_bytes:,} of {manifest.dense_bytes:,}). All other tensors are dense.\n"
    ]
    if manifest.kept_dense:
        lines.append("Layers of the allocation that stay dense:\n")
        lines += [
            f"- {count} because {reason}"
            for reason, count in sorted(Counter(map(short_reason, manifest.kept_dense.values())).items())
        ]
        lines.append("")
    return "\n".join(lines)


_SERVED_USE = """## Use it

Serve it with an unmodified vLLM (0.32 or newer) that has `msp_plugin` installed beside it; no flag is needed:

```bash
pip install '.[vllm]'    # in a checkout of msp_plugin
vllm serve THIS_DIRECTORY
```

"""

_LEFT_OUT = """Heads and channels that did nothing are left out. {} says what stays.
"""

_SMALL_USE = """## Use it

```python
import msp_plugin
model = msp_plugin.load("THIS_DIRECTORY")
```

transformers alone refuses it: it reads one width for all blocks.
"""

_UNIFORM_USE = """## Use it

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
```

It is a plain model of its type in all other respects too.
"""

_PACKED_USE = """Load it in Python as a ready transformers model:

```python
import msp_plugin
model = msp_plugin.load("THIS_DIRECTORY")
```

Without `msp_plugin`, transformers fails on it (`'NoneType' object has no attribute 'config_groups'`) and vLLM
from 0.19 on refuses it. For machines without `msp_plugin`, write the dense form, with the same weights bit for bit:

```bash
msp export THIS_DIRECTORY --to dense --out dense
```
"""

_DENSE_USE = """## Use it

```python
from transformers import AUTO_CLASS
model = AUTO_CLASS.from_pretrained("THIS_DIRECTORY")
```

vLLM serves it as any dense model. With `msp_plugin` beside it, `vllm serve THIS_DIRECTORY --quantization
sparse24` packs the layers that are 2:4 when it loads them, and `msp export THIS_DIRECTORY --to sparse24 --out
packed` writes them packed.
"""


def _recovered(source: Checkpoint) -> str:
    """Return the section on the recoveries and their gain; empty for a run without one."""
    record = RunRecord.beside(source.path)
    stages = () if record is None else record.stages
    lines = []
    for before, stage in pairwise(stages):
        if stage.recovery is None:
            continue
        gain = ""
        if stage.perplexity is not None and before.perplexity is not None:
            gain = f": test perplexity {stage.perplexity:.3f}, before it {before.perplexity:.3f}"
        lines.append(f"- `{stage.recovery.method.get('name')}`{gain}")
    if not lines:
        return ""
    dense = next((s.perplexity for s in stages if s.name == DENSE and s.perplexity is not None), None)
    end = "." if dense is None else f"; the dense model has {dense:.3f}."
    return "\n".join(
        [
            "## Recovery\n",
            f"The surviving weights were changed after pruning; every zero stayed{end}\n",
            *lines,
            "",
        ]
    )


def _has_masks(source: Checkpoint) -> bool:
    """Return False if a model lost only heads, channels and halves, as its allocation says, or its widths without one."""
    if source.allocation is None:
        return not source.smaller
    return any(level.masks for level in source.allocation.by_layer.values())


def _levels(source: Checkpoint) -> str:
    """Return the table of levels; empty without an allocation."""
    if source.allocation is None:
        return ""
    count: Counter[str] = Counter()
    for level in source.allocation.by_layer.values():
        count[level.name] += 1
    budget = source.allocation.budget
    lines = [
        "## Sparsity\n",
        f"{budget.zeros:,} of {budget.weights:,} prunable weights are zero "
        f"({100 * float(budget.sparsity):.2f} %).{' N:M keeps N of M.' if _has_masks(source) else ''}\n",
        "| level | layers |",
        "|---|---|",
        *(f"| {name} | {layers} |" for name, layers in sorted(count.items())),
        "",
    ]
    return "\n".join(lines)
