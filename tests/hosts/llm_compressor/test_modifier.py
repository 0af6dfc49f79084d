"""The modifier through llm-compressor's own ``oneshot``, on a tiny model of Qwen2's type."""

import json

import pytest
import torch
from loguru import logger
from transformers import AutoModelForCausalLM

from msp_plugin import MixedSparsityModifier
from msp_plugin.errors import NumericsError, VerificationError
from msp_plugin.models.load import load_model
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level
from tests.helpers.models import llama
from tests.helpers.oneshot import FISHER, SEARCH, groups, hooks, linears, run


@pytest.fixture
def fresh(qwen2_dir):
    """Load the model anew."""
    return lambda: load_model(qwen2_dir, "float32")


@pytest.fixture
def model(fresh):
    return fresh()


@pytest.fixture
def wide(tokenizer, tmp_path):
    """A model whose layers have whole groups of 128 inputs, as quantization schemes want them."""
    llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return load_model(tmp_path / "wide", "float32")


@pytest.fixture(scope="module")
def calibration(make_samples):
    return make_samples(8, 64)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_every_method_prunes_every_group_to_the_level_and_touches_nothing_else(
    method, model, calibration, tmp_path
):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modifier = MixedSparsityModifier(
        sparsity=0.5, levels=["2:4"], method=method, allocator="uniform", cache=str(tmp_path),
        ignore=["re:.*layers.0.mlp.down_proj"],
    )  # fmt: skip
    run(model, [modifier], calibration)
    for name, module in linears(model).items():
        if name == "model.layers.0.mlp.down_proj":
            assert torch.equal(module.weight, before[f"{name}.weight"])
        else:
            assert (groups(module.weight, 4) == 2).all(), name
    pruned = {f"{name}.weight" for name in modifier.stats.zeros}
    for name, parameter in model.named_parameters():
        if name not in pruned:
            assert torch.equal(parameter, before[name]), name
    assert modifier.stats.sparsity == 0.5
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("method", "host"), [("sparsegpt", "SparseGPTModifier"), ("wanda", "WandaPruningModifier")]
)
@pytest.mark.parametrize("pipeline", ["sequential", pytest.param("independent", marks=pytest.mark.slow)])
def test_a_uniform_2_4_run_is_bit_identical_to_the_hosts_own(
    method, host, pipeline, model, calibration, fresh
):
    from llmcompressor.modifiers.factory import ModifierFactory

    ours = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method=method, allocator="uniform")
    run(model, [ours], calibration, pipeline=pipeline)
    theirs = ModifierFactory.create(
        host, allow_registered=True, allow_experimental=True, sparsity=0.5, mask_structure="2:4",
        targets=["Linear"], ignore=["re:.*lm_head"],
    )  # fmt: skip
    reference = fresh()
    run(reference, [theirs], calibration, pipeline=pipeline)
    for name, module in linears(reference).items():
        assert torch.equal(module.weight, model.get_submodule(name).weight), name


def test_a_given_allocation_is_pruned_layer_by_layer(model, calibration, tmp_path, fresh):
    searched = MixedSparsityModifier(
        sparsity=0.75, method="wanda", allocator=SEARCH, estimators=FISHER, cache=str(tmp_path)
    )
    run(model, [searched], calibration, output_dir=str(tmp_path / "first"))
    path = tmp_path / "first" / "allocation.json"
    allocation = Allocation.read(path)
    assert len(set(allocation.levels)) > 1

    again = fresh()
    given = MixedSparsityModifier(allocation=str(path), method="wanda")
    run(again, [given], calibration)
    for name, level in allocation.by_layer.items():
        weight = again.get_submodule(name).weight
        assert groups(weight, level.m).max() == groups(weight, level.m).min() == level.n, name
        assert torch.equal(weight, model.get_submodule(name).weight)


def test_the_same_recipe_twice_gives_the_same_bytes(calibration, tmp_path, fresh):
    files = []
    for turn in ("a", "b"):
        model = fresh()
        modifier = MixedSparsityModifier(
            sparsity="5/8",
            method="sparsegpt",
            allocator=SEARCH,
            estimators=FISHER,
            cache=str(tmp_path / turn),
        )
        run(model, [modifier], calibration, output_dir=str(tmp_path / f"out-{turn}"))
        files.append(tmp_path / f"out-{turn}")
    for name in ("allocation.json", "model.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes(), name


def test_a_run_leaves_a_checkpoint_that_plain_transformers_loads(model, calibration, tmp_path):
    modifier = MixedSparsityModifier(sparsity=0.75, method="magnitude", allocator="uniform", levels=["2:8"])
    run(model, [modifier], calibration, output_dir=str(tmp_path / "out"))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "allocation.json", "run.json"} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and "sparsity_config" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, module in linears(plain).items():
        assert torch.equal(module.weight, model.get_submodule(name).weight)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["sparsity"]["achieved"] == record["sparsity"]["target"] == 0.75
    assert record["sparsity"]["zeros"] == sum(int((m.weight == 0).sum()) for m in linears(plain).values())


def test_a_yaml_recipe_gives_what_python_gives(model, calibration, tmp_path, fresh):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage:\n  b_modifiers:\n    MixedSparsityModifier:\n"
        '      {sparsity: 0.5, method: wanda, allocator: uniform, levels: ["4:8"]}\n'
    )
    run(model, str(recipe), calibration, output_dir=str(tmp_path / "out"))
    other = fresh()
    run(
        other,
        [MixedSparsityModifier(sparsity=0.5, method="wanda", allocator="uniform", levels=["4:8"])],
        calibration,
    )
    for name, module in linears(other).items():
        assert torch.equal(module.weight, model.get_submodule(name).weight)
    assert "MixedSparsityModifier" in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize("scheme", [pytest.param("FP8_DYNAMIC", marks=pytest.mark.slow), "W4A16"])
@pytest.mark.parametrize("pipeline", ["sequential", pytest.param("independent", marks=pytest.mark.slow)])
def test_round_to_nearest_quantization_afterwards_keeps_the_pattern_after_reload(
    scheme, pipeline, wide, calibration, tmp_path
):
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers.utils.quantization_config import CompressedTensorsConfig

    modifier = MixedSparsityModifier(
        sparsity=0.75, method="wanda", allocator=SEARCH, estimators=FISHER, cache=str(tmp_path)
    )
    quantize = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    run(wide, [modifier, quantize], calibration, output_dir=str(tmp_path / "out"), pipeline=pipeline)
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    allocation = Allocation.read(tmp_path / "out" / "allocation.json")
    for name, level in allocation.by_layer.items():
        weight = reloaded.get_submodule(name).weight.float()
        assert (groups(weight, level.m) <= level.n).all(), name
        assert (weight != 0).any(), name


def test_a_later_modifier_that_destroys_the_pattern_is_an_error(wide, calibration):
    from llmcompressor.modifiers.gptq import GPTQModifier

    ours = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="wanda", allocator="uniform")
    gptq = GPTQModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"])
    with pytest.raises(VerificationError, match="after a later modifier.*planned was 2:4"):
        run(wide, [ours, gptq], calibration)


def test_a_method_that_fails_leaves_no_hooks_in_the_model(model, calibration):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)  # overflows in the activations, finite itself
    modifier = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="sparsegpt", allocator="uniform")
    with pytest.raises(NumericsError, match="layers.1.mlp.down_proj"):
        run(model, [modifier], calibration)
    assert hooks(model) == 0


def test_a_search_that_is_interrupted_restores_the_dense_weights(model, calibration, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modifier = MixedSparsityModifier(
        sparsity=0.75, method="wanda", allocator=SEARCH, estimators=FISHER, cache=str(tmp_path)
    )

    def interrupt(step, done, total):
        if step == "search" and done == 2:
            raise KeyboardInterrupt

    modifier.report_to(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, [modifier], calibration)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert hooks(model) == 0


def test_the_search_says_in_the_hosts_log_how_far_it_is(model, calibration, tmp_path):
    said = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="INFO")
    try:
        modifier = MixedSparsityModifier(
            sparsity=0.75, method="magnitude", allocator=SEARCH, estimators=FISHER, cache=str(tmp_path)
        )
        run(model, [modifier], calibration)
    finally:
        logger.remove(sink)
    lines = [line for line in said if " done in 0:" in line]
    assert [
        step for step in ("sensitivity", "level database", "search", "pruning") if step not in str(lines)
    ] == []


def test_dense_levels_leave_their_layers_bit_identical(model, calibration, tmp_path):
    from msp_plugin.models.layers import prunable_layers

    table = prunable_layers(model)
    levels = tuple(Level.parse("2:8" if unit.block % 2 else "dense") for unit in table)
    path = tmp_path / "allocation.json"
    draft = Allocation(table, levels, target="1/2")
    path.write_text(Allocation(table, levels, draft.budget.sparsity).to_json())
    before = {name: m.weight.detach().clone() for name, m in linears(model).items()}
    run(model, [MixedSparsityModifier(allocation=str(path), method="sparsegpt")], calibration)
    for name, level in Allocation.read(path).by_layer.items():
        same = torch.equal(model.get_submodule(name).weight, before[name])
        assert same == level.is_dense, name


def test_sparsity_zero_changes_nothing(model, calibration):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, [MixedSparsityModifier(sparsity=0, method="sparsegpt", allocator="uniform")], calibration)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_the_recipe_that_a_run_leaves_runs_again(model, calibration, tmp_path, fresh):
    modifier = MixedSparsityModifier(
        sparsity="5/8", method={"name": "sparsegpt", "block_size": 64}, allocator="uniform", ignore=["k_proj"]
    )
    run(model, [modifier], calibration, output_dir=str(tmp_path / "out"))
    again = fresh()
    run(again, str(tmp_path / "out" / "recipe.yaml"), calibration)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_an_allocation_brings_its_own_targets(model, calibration, tmp_path, fresh):
    first = MixedSparsityModifier(
        sparsity=0.5, method="magnitude", levels=["2:4"], allocator="uniform", targets=["down_proj"]
    )
    run(model, [first], calibration, output_dir=str(tmp_path / "out"))
    again = fresh()
    path = str(tmp_path / "out" / "allocation.json")
    run(again, [MixedSparsityModifier(allocation=path, method="magnitude")], calibration)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_a_target_that_the_levels_cannot_meet_exactly_is_met_to_the_nearest_count(demo_model, calibration):
    modifier = MixedSparsityModifier(sparsity=0.7, method="magnitude", allocator="uniform")
    run(demo_model, [modifier], calibration)
    budget = modifier.outcome.allocation.budget
    assert not budget.exact
    assert modifier.stats.total_zeros == budget.zeros
    assert abs(float(budget.sparsity) - 0.7) < 1e-3
