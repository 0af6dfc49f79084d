"""The key of a level database names what its weights depend on."""

from dataclasses import dataclass, replace

from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import prunable_layers
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.pruning.plain_groups import L2
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.search import keys
from msp_plugin.search.level_database import open_database
from tests.helpers.losses import MENU


def key_of(model_id, data, made):
    return open_database(model_id, data, made.pruner, made.menu, made.cache).key


def test_every_input_of_the_weights_changes_the_databases_key(llama, qwen2, data, make_samples, msp_plan):
    def key(model=llama, samples=data, **options):
        return key_of(fingerprint(model), samples, msp_plan(**options))

    sparsegpt = {"method": "sparsegpt"}
    keys = [
        key(**sparsegpt), key(qwen2, **sparsegpt), key(samples=make_samples(seed=1), **sparsegpt),
        key(method={"name": "sparsegpt", "dampening_frac": 0.02}), key(method="wanda"),
        key(levels=["dense", "4:8"], **sparsegpt),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(seed=5, sparsity=0.25, allocator="uniform", **sparsegpt) == keys[0]


def test_a_method_without_statistics_has_one_database_for_all_samples(llama, data, make_samples, msp_plan):
    made = msp_plan(method="magnitude")
    assert key_of("m", data, made) == key_of("m", make_samples(seed=1), made)


def test_a_database_is_named_by_what_its_weights_depend_on(llama, qwen2, make_samples, tmp_path, monkeypatch):
    data, other, cache = make_samples(), make_samples(seed=1), str(tmp_path)

    def key(model=llama, samples=data, pruner=SparseGPT(), menu=MENU):
        return open_database(fingerprint(model), samples, pruner, menu, cache).key

    def held(batch_tokens=64, device="cpu"):
        made = open_database(
            fingerprint(llama), data, SparseGPT(), MENU, cache, batch_tokens=batch_tokens, device=device
        )
        return made.key

    assert len({held(), held(128), held(device="cuda")}) == 3  # sums of other batches round otherwise
    before = held()
    monkeypatch.setattr(keys, "measuring_code", lambda: "other code")
    assert held() != before
    monkeypatch.undo()
    found = [
        key(), key(qwen2), key(samples=other), key(pruner=replace(SparseGPT(), dampening_frac=0.02)),
        key(pruner=Wanda()), key(menu=MENU[:2]),
    ]  # fmt: skip
    assert len(set(found)) == len(found) and key() == found[0]
    assert key(pruner=Magnitude()) == key(pruner=Magnitude(), samples=other)  # it needs no statistics


def test_a_method_of_gradients_alone_has_a_database_for_each_text(llama, data, make_samples, msp_plan):
    @dataclass(frozen=True)
    class Gradients(Magnitude):
        gradient_order = 1

    made = replace(msp_plan(method="magnitude", allocator="uniform"), pruner=Gradients())
    assert made.needs_data and key_of("m", data, made) != key_of("m", make_samples(seed=1), made)


def test_a_method_of_whole_units_has_a_database_for_each_grouping_of_the_layers(llama, data, tmp_path):
    tables = [prunable_layers(llama, granularity=name) for name in ("half", "block", "half")]
    half, block, again = (
        open_database("m", data, L2(), MENU, str(tmp_path), table=table).key for table in tables
    )
    assert half == again != block
