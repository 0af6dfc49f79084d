"""What must not change unless somebody means it: the allocation of a demo model, level by level."""

import hashlib

import msp_plugin
from msp_plugin.demo import demo_model_path

#: Change it only with the reason in the commit's message.
DIGEST = "6b9de8bbf97c346b028278b7f742dc498d5981920e5a5fa68e42c4065edfa87d"


def test_the_demo_models_allocation_is_the_one_of_all_versions_before(tmp_path):
    found = msp_plugin.allocate(
        demo_model_path("qwen2"),
        "demo:calibration",
        dtype="float32",
        sparsity=0.75,
        method="magnitude",
        allocator={"name": "knapsack", "surrogate": "weight"},
        granularity="layer",
        cache=str(tmp_path),
    )
    assert hashlib.sha256(" ".join(level.name for level in found.levels).encode()).hexdigest() == DIGEST
