"""``RecoveryModifier`` in recipes: through ``oneshot``, and through ``msp run``."""

import copy
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from msp_plugin import MixedSparsityModifier, RecoveryModifier, Text, prune, run_recipe
from msp_plugin.demo import demo_model_path
from msp_plugin.errors import ModelError, OutputError, RecipeError
from msp_plugin.hosts.llm_compressor.host import LLMCompressor
from msp_plugin.hosts.llm_compressor.recipe import Recipe
from msp_plugin.models.load import load_model
from msp_plugin.passes.losses import mean_kl
from msp_plugin.plugins.manager import Plugins
from msp_plugin.recovery.step import RecoveryStep

PRUNE = {"sparsity": 0.5, "levels": ["2:4"], "method": "magnitude", "allocator": "uniform"}
QUICK = {"name": "blockwise", "epochs": 1, "rates": [0.06]}
INT8 = {"num_bits": 8, "type": "int"}
#: Activations have one scale for all, and a zero point.
STATIC = {
    "targets": ["Linear"],
    "weights": {**INT8, "strategy": "channel"},
    "input_activations": {**INT8, "strategy": "tensor", "symmetric": False, "dynamic": False},
}
QUANTIZE = {"config_groups": {"linears": STATIC}, "ignore": ["lm_head"]}


@pytest.fixture(scope="module")
def calibration(make_samples):
    return make_samples(8, 48)


@pytest.fixture
def fresh(qwen2_dir):
    """Load the model anew."""
    return lambda: load_model(qwen2_dir, "float32")


@pytest.fixture
def model(fresh):
    return fresh()


def run(model, modifiers, calibration, **kwargs):
    from llmcompressor import oneshot

    samples = [{"input_ids": sample} for sample in calibration.samples]
    return oneshot(model=model, recipe=modifiers, dataset=DataLoader(samples, batch_size=1), **kwargs)


def zeros(model):
    return {
        n: m.weight == 0 for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    }


def test_a_line_behind_the_pruning_recovers_with_the_pruned_models_zeros(model, calibration, tmp_path, fresh):
    pruned = fresh()
    run(pruned, [MixedSparsityModifier(**PRUNE)], calibration)
    line = RecoveryModifier(method=QUICK, cache=str(tmp_path / "cache"))
    run(model, [MixedSparsityModifier(**PRUNE), line], calibration, output_dir=str(tmp_path / "out"))
    before, after = zeros(pruned), zeros(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    dense = fresh()
    assert mean_kl(dense, model, calibration) < 0.9 * mean_kl(dense, pruned, calibration)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["prune", "recover"]
    assert record["stages"][-1]["recovery"]["method"]["epochs"] == 1
    assert "RecoveryModifier" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert not list((tmp_path / "cache" / "recovery").iterdir())


def test_the_mean_update_works_behind_the_pruning(llama_dir, calibration, tmp_path):
    model = load_model(llama_dir, "float32")
    line = RecoveryModifier(method="mean_update", cache=str(tmp_path / "cache"))
    run(model, [MixedSparsityModifier(**PRUNE), line], calibration, output_dir=str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    changed = any(p.any() for name, p in model.named_parameters() if name.endswith(".bias"))
    assert record["stages"][-1]["recovery"]["method"]["name"] == "mean_update"
    assert changed != bool(record["stages"][-1]["recovery"]["notes"])  # a note says that nothing was changed


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_later_quantization_with_static_scales_is_no_part_of_the_recovery(
    fresh, calibration, tmp_path, monkeypatch
):
    from llmcompressor.modifiers.quantization import QuantizationModifier

    keys, recovered, step = [], [], RecoveryStep.run

    def noted(self, model, original, masks, allocation, key, until):
        stage = step(self, model, original, masks, allocation, key, until)
        keys.append(key)  # of the state that a stopped recovery leaves
        recovered.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return stage

    monkeypatch.setattr(RecoveryStep, "run", noted)
    for later in ([], [QuantizationModifier(**QUANTIZE)]):
        line = RecoveryModifier(method=QUICK, cache=str(tmp_path))
        run(model := fresh(), [MixedSparsityModifier(**PRUNE), line, *later], calibration)
    assert keys[0] == keys[1] and recovered[0].keys() == recovered[1].keys()
    assert all(torch.equal(recovered[0][name], recovered[1][name]) for name in recovered[0])
    assert model.model.layers[0].mlp.up_proj.input_zero_point.dtype == torch.int8


@pytest.mark.slow
def test_a_recipe_gives_the_bytes_of_prune_with_recover(tmp_path):
    text = Text("demo:calibration", samples=8, length=48, test="demo:test", test_samples=4)
    source = demo_model_path("qwen2")
    cache = str(tmp_path / "cache")
    prune(source, text, tmp_path / "own", **PRUNE, recover=QUICK, dtype="float32", cache=cache)
    lines = {
        "MixedSparsityModifier": {**PRUNE, "cache": cache},
        "RecoveryModifier": {"method": QUICK, "cache": cache},
    }
    recipe = {"a_stage": {"b_modifiers": lines}}
    run_recipe(recipe, source, text, tmp_path / "host", dtype="float32")
    own, host = weights(tmp_path / "own"), weights(tmp_path / "host")
    assert own.keys() == host.keys() and all(torch.equal(own[name], host[name]) for name in own)
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("own", "host")]
    assert records[0]["perplexity"] == records[1]["perplexity"] and records[0]["kl"] == records[1]["kl"]
    assert records[1]["perplexity"]["recovered"] < records[1]["perplexity"]["mixed"]
    stages = [[{**s, "seconds": None} for s in record["stages"]] for record in records]
    assert stages[0] == stages[1] and [s["name"] for s in stages[0]] == ["dense", "prune", "recover"]
    left = yaml.safe_load((tmp_path / "own" / "recipe.yaml").read_text())["sparsity_stage"][
        "sparsity_modifiers"
    ]
    assert left["RecoveryModifier"] == {"method": records[0]["stages"][2]["recovery"]["method"], "seed": 0}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W4A16"])
def test_a_later_line_quantizes_the_recovered_model_and_keeps_the_zeros(scheme, tmp_path):
    text = Text("demo:calibration", samples=8, length=48, test="demo:test", test_samples=4)
    lines = {
        "MixedSparsityModifier": PRUNE,
        "RecoveryModifier": {"method": QUICK},
        "QuantizationModifier": {"targets": ["Linear"], "scheme": scheme, "ignore": ["lm_head"]},
    }
    run_recipe({"a_stage": {"b_modifiers": lines}}, demo_model_path("qwen2"), text, tmp_path / "out")
    recovered = run_recipe(
        {"a_stage": {"b_modifiers": {n: lines[n] for n in ("MixedSparsityModifier", "RecoveryModifier")}}},
        demo_model_path("qwen2"), text, tmp_path / "recovered",
    )  # fmt: skip
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    before, after = zeros(load_model(tmp_path / "recovered")), zeros(quantized)
    assert all(bool(after[name][zero].all()) for name, zero in before.items())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    values = record["perplexity"], recovered.record.perplexity
    assert record["stages"][-1]["perplexity"] == values[0]["recovered"] == values[1]["recovered"]
    assert values[0]["mixed"] == values[1]["mixed"] and values[0]["final"] != values[0]["recovered"]
    assert values[0]["final"] < 1.2 * values[0]["recovered"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W4A16"])
def test_a_recovered_checkpoint_is_quantized_by_oneshot_with_its_zeros(
    scheme, demo_calibration, msp, tmp_path
):
    from llmcompressor.modifiers.quantization import QuantizationModifier

    text = Text("demo:calibration", samples=8, length=48, test="demo:test", test_samples=4)
    recovered, out = tmp_path / "recovered", tmp_path / "out"
    prune(demo_model_path("qwen2"), text, recovered, **PRUNE, recover=QUICK, cache=str(tmp_path / "cache"))
    quantize = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    run(load_model(recovered), [quantize], demo_calibration, output_dir=str(out))
    for name in ("allocation.json", "run.json"):
        shutil.copyfile(recovered / name, out / name)
    config = CompressedTensorsConfig(dequantize=True)
    quantized = AutoModelForCausalLM.from_pretrained(out, quantization_config=config)
    before, after = zeros(load_model(recovered)), zeros(quantized)
    assert all(bool(after[name][zero].all()) for name, zero in before.items())
    said = msp("verify", out).out
    assert "FAIL" not in said and "passed" in said
    dense = load_model(demo_model_path("qwen2"))
    assert mean_kl(dense, quantized, demo_calibration) < 1.5 * mean_kl(
        dense, load_model(recovered), demo_calibration
    )


@pytest.mark.slow
def test_the_hosts_own_pruning_is_recovered_too(model, calibration, tmp_path):
    from llmcompressor.modifiers.factory import ModifierFactory

    pruning = ModifierFactory.create(
        "WandaPruningModifier", allow_registered=True, allow_experimental=True, sparsity=0.5,
        mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"],
    )  # fmt: skip
    line = RecoveryModifier(method="weight_update", cache=str(tmp_path))
    run(model, [pruning, line], calibration)
    assert all(int(zero.sum()) == zero.numel() // 2 for zero in zeros(model).values())
    before, after = line.recovered.stage.recovery.curve[0][1], line.recovered.stage.recovery.curve[-1][1]
    assert after < before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "masked_lora"}, "trains on more text"),
        ({"method": "no_such"}, "no_such"),
        ({"methods": "blockwise"}, "no key 'methods'"),
        ({"method": {"name": "blockwise", "epochs": 0}}, "epochs"),
    ],
)
def test_a_line_that_cannot_work_is_refused_when_it_is_read(options, words):
    with pytest.raises(RecipeError, match=words):
        RecoveryModifier(**options)


def test_a_line_before_the_pruning_is_refused(model, calibration):
    with pytest.raises(RecipeError, match="before MixedSparsityModifier"):
        run(model, [RecoveryModifier(method=QUICK), MixedSparsityModifier(**PRUNE)], calibration)


def test_a_line_in_the_wrong_place_beside_the_hosts_own_is_refused(model, calibration):
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    wanda = WandaPruningModifier(
        sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    with pytest.raises(RecipeError, match="before WandaPruningModifier"):
        run(model, [RecoveryModifier(method=QUICK), wanda], calibration)
    quantize = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    with pytest.raises(RecipeError, match="behind QuantizationModifier") as error:
        run(model, [MixedSparsityModifier(**PRUNE), quantize, RecoveryModifier(method=QUICK)], calibration)
    assert "between the pruning and the quantization" in error.value.hint


def test_a_pruned_model_is_not_its_own_original(qwen2_dir, calibration, tmp_path):
    text = Text("demo:calibration", samples=8, length=48, test_samples=0)
    prune(demo_model_path("qwen2"), text, tmp_path / "run", **PRUNE, cache=str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="has all the zeros") as error:
        run(load_model(tmp_path / "run"), [RecoveryModifier(method=QUICK)], calibration)
    assert "the dense model as original" in error.value.hint


def test_two_recoveries_leave_the_uniform_baseline_that_was_pruned(llama_dir, tmp_path):
    text = Text("demo:calibration", samples=8, length=48, test="demo:test", test_samples=4)
    lines = {"MixedSparsityModifier": PRUNE, "RecoveryModifier": {"method": "weight_update"}}
    second = {"RecoveryModifier": {"method": QUICK}}
    recipe = {"a_stage": {"a_modifiers": lines}, "b_stage": {"b_modifiers": second}}
    found = run_recipe(
        recipe, demo_model_path("llama"), text, tmp_path / "out", dtype="float32"
    ).record.perplexity
    assert found["uniform"] == found["mixed"] != found["recovered"]


def test_one_calibration_for_all_modifiers_is_refused(model, calibration):
    modifiers = [MixedSparsityModifier(**PRUNE), RecoveryModifier(method=QUICK)]
    with pytest.raises(RecipeError, match="share one calibration"):
        run(model, modifiers, calibration, pipeline="sequential")


def test_a_dense_model_is_refused(model, calibration):
    with pytest.raises(ModelError, match="the model is dense"):
        run(model, [RecoveryModifier(method=QUICK)], calibration)


def test_dense_weights_that_are_not_in_the_files_need_an_original(model, calibration, tmp_path):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "dense")
    line = RecoveryModifier(method=QUICK, original=str(tmp_path / "dense"), cache=str(tmp_path))
    run(copy.deepcopy(model), [MixedSparsityModifier(**PRUNE), line], calibration)
    assert line.recovered is not None


def behind_a_quantization(model):
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(**QUANTIZE), RecoveryModifier(method=QUICK)]


def of_another_family(model):
    return [RecoveryModifier(method="mean_update")]


def of_changed_weights(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    return [RecoveryModifier(method=QUICK)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (behind_a_quantization, "stands behind QuantizationModifier"),
        (of_another_family, "have no biases"),
        (of_changed_weights, "layers.1.mlp.up_proj is not as in"),
    ],
)
def test_a_recovery_that_cannot_work_is_refused_before_the_search(
    lines, words, model, calibration, monkeypatch
):
    monkeypatch.setattr(
        f"{MixedSparsityModifier.__module__}.allocate", lambda *_, **__: pytest.fail("searched")
    )
    with pytest.raises((ModelError, RecipeError), match=words):
        run(model, [MixedSparsityModifier(**PRUNE), *lines(model)], calibration)


def test_a_model_whose_blocks_share_keys_is_refused_before_any_work(model):
    model.config.num_kv_shared_layers = 1
    lines = {"MixedSparsityModifier": PRUNE, "RecoveryModifier": {"method": QUICK}}
    recipe = Recipe.parse({"a_stage": {"b_modifiers": lines}}, Plugins())
    with pytest.raises(ModelError, match="one pass for all modifiers") as error:
        LLMCompressor(recipe).check(model, recipe.options, inputs=None)
    assert "msp recover" in error.value.hint


def test_a_recovery_that_fails_leaves_the_pruned_model_beside_the_result(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(RecoveryStep, "run", broken)
    text = Text("demo:calibration", samples=8, length=48, test_samples=0)
    lines = {
        "MixedSparsityModifier": PRUNE,
        "RecoveryModifier": {"method": QUICK},
        "QuantizationModifier": QUANTIZE,
    }
    with pytest.raises(OutputError, match="which the recovery may have begun to change, is kept in"):
        run_recipe({"a_stage": {"b_modifiers": lines}}, demo_model_path("qwen2"), text, tmp_path / "out")
    kept = tmp_path / "out.unsaved"
    assert all(int(zero.sum()) == zero.numel() // 2 for zero in zeros(load_model(kept)).values())
    assert not [name for name in weights(kept) if name.endswith("scale")]
    assert (kept / "allocation.json").is_file() and not (tmp_path / "out").exists()
