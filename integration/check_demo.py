"""Check a finished `msp demo` from outside: with torch, transformers and json alone.

    python integration/check_demo.py DIRECTORY

Recounts every zero in the checkpoint that plain transformers loads, holds each group against its
level, and fails if mixed sparsity is not ahead of uniform by what the model's results allow to expect.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

#: By demo model: the least share of the loss that uniform adds and mixed takes back. Measured: 0.55 and 0.06; other
#: processors round in another way, and their searches end elsewhere.
TAKEN_BACK = {"qwen2": 0.4, "llama": 0.02}


def main(path: Path) -> int:
    allocation = json.loads((path / "allocation.json").read_text())
    record = json.loads((path / "run.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(path)
    zeros = weights = 0
    for unit in allocation["units"]:
        n, m = (1, 1) if unit["level"] == "dense" else map(int, unit["level"].split(":"))
        for layer in unit["layers"]:
            weight = model.get_submodule(layer["name"]).weight
            kept = (weight.reshape(weight.shape[0], -1, m) != 0).sum(-1)
            assert n == m or (kept <= n).all(), f"{layer['name']} breaks {n}:{m}"
            zeros += int((weight == 0).sum())
            weights += weight.numel()
    assert zeros == record["sparsity"]["zeros"] == allocation["budget"]["zeros"], zeros
    assert 4 * zeros == 3 * weights, f"{zeros} of {weights} are zero, not 75 %"
    quality = record["perplexity"]
    assert quality["dense"] < quality["mixed"] < quality["uniform"], quality
    dense, uniform, mixed = (math.log(quality[name]) for name in ("dense", "uniform", "mixed"))
    taken_back = (uniform - mixed) / (uniform - dense)
    least = TAKEN_BACK[record["model"]["source"].removeprefix("demo:")]
    assert taken_back >= least, f"mixed takes back {taken_back:.3f} of the loss, expected {least} at least"
    text = AutoTokenizer.from_pretrained(path)("def main(", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=8, do_sample=False).shape[1] > text["input_ids"].shape[1]
    print(f"demo checked: {zeros:,} of {weights:,} weights are zero, {quality}, {taken_back:.2f} taken back")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
