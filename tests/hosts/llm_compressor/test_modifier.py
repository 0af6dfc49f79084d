"""The modifier through llm-compressor's own ``oneshot``, on the embedded Qwen2-type model."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from msp_plugin import MixedSparsityModifier
from msp_plugin.data.sources import load_texts
from msp_plugin.data.tokenize import tokenize
from msp_plugin.demo import demo_model_path
from msp_plugin.errors import HostError, NumericsError, RecipeError, VerificationError
from msp_plugin.models.load import load_model
from msp_plugin.models.source import load_tokenizer
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level

SEARCH = {"name": "msp", "population": 3, "generations": 1, "offspring": 2, "tokens": 128}
FISHER = {"fisher": {"samples": 2}}


@pytest.fixture(scope="module")
def calibration():
    tokenizer = load_tokenizer(demo_model_path("qwen2"))
    texts = load_texts("demo:calibration")
    return tokenize(tokenizer, texts, samples=8, length=64, source="demo:calibration")


@pytest.fixture
def model():
    return load_model(demo_model_path("qwen2"), "float32")


def loader(calibration):
    return DataLoader([{"input_ids": sample} for sample in calibration.samples], batch_size=4)


def run(model, recipe, calibration, **kwargs):
    from llmcompressor import oneshot

    return oneshot(model=model, recipe=recipe, dataset=loader(calibration), **kwargs)


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def groups(weight, m):
    return (weight.reshape(weight.shape[0], -1, m) != 0).sum(-1)


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}


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
def test_a_uniform_2_4_run_is_bit_identical_to_the_hosts_own(method, host, pipeline, model, calibration):
    from llmcompressor.modifiers.factory import ModifierFactory

    ours = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method=method, allocator="uniform")
    run(model, [ours], calibration, pipeline=pipeline)
    theirs = ModifierFactory.create(
        host, allow_registered=True, allow_experimental=True, sparsity=0.5, mask_structure="2:4",
        targets=["Linear"], ignore=["re:.*lm_head"],
    )  # fmt: skip
    reference = load_model(demo_model_path("qwen2"), "float32")
    run(reference, [theirs], calibration, pipeline=pipeline)
    for name, module in linears(reference).items():
        assert torch.equal(module.weight, model.get_submodule(name).weight), name


def test_a_given_allocation_is_pruned_layer_by_layer(model, calibration, tmp_path):
    searched = MixedSparsityModifier(
        sparsity=0.75, method="wanda", allocator=SEARCH, estimators=FISHER, cache=str(tmp_path)
    )
    run(model, [searched], calibration, output_dir=str(tmp_path / "first"))
    path = tmp_path / "first" / "allocation.json"
    allocation = Allocation.read(path)
    assert len(set(allocation.levels)) > 1

    again = load_model(demo_model_path("qwen2"), "float32")
    given = MixedSparsityModifier(allocation=str(path), method="wanda")
    run(again, [given], calibration)
    for name, level in allocation.by_layer.items():
        weight = again.get_submodule(name).weight
        assert groups(weight, level.m).max() == groups(weight, level.m).min() == level.n, name
        assert torch.equal(weight, model.get_submodule(name).weight)


def test_the_same_recipe_twice_gives_the_same_bytes(calibration, tmp_path):
    files = []
    for turn in ("a", "b"):
        model = load_model(demo_model_path("qwen2"), "float32")
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


def test_a_yaml_recipe_gives_what_python_gives(model, calibration, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage:\n  b_modifiers:\n    MixedSparsityModifier:\n"
        '      {sparsity: 0.5, method: wanda, allocator: uniform, levels: ["4:8"]}\n'
    )
    run(model, str(recipe), calibration, output_dir=str(tmp_path / "out"))
    other = load_model(demo_model_path("qwen2"), "float32")
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
    scheme, pipeline, model, calibration, tmp_path
):
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers.utils.quantization_config import CompressedTensorsConfig

    modifier = MixedSparsityModifier(
        sparsity=0.75, method="wanda", allocator=SEARCH, estimators=FISHER, cache=str(tmp_path)
    )
    quantize = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    run(model, [modifier, quantize], calibration, output_dir=str(tmp_path / "out"), pipeline=pipeline)
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    allocation = Allocation.read(tmp_path / "out" / "allocation.json")
    for name, level in allocation.by_layer.items():
        weight = reloaded.get_submodule(name).weight.float()
        assert (groups(weight, level.m) <= level.n).all(), name
        assert (weight != 0).any(), name


def test_a_later_modifier_that_destroys_the_pattern_is_an_error(model, calibration):
    from llmcompressor.modifiers.gptq import GPTQModifier

    ours = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="wanda", allocator="uniform")
    gptq = GPTQModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"])
    with pytest.raises(VerificationError, match="after a later modifier.*planned was 2:4"):
        run(model, [ours, gptq], calibration)


def test_a_method_that_fails_leaves_no_hooks_in_the_model(model, calibration):
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1e30)  # overflows in the activations, finite itself
    modifier = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="sparsegpt", allocator="uniform")
    with pytest.raises(NumericsError, match="layers.3.mlp.down_proj"):
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


@contextmanager
def refused(error, *words):
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)


def test_options_are_refused_before_a_model_is_there():
    with refused(RecipeError, "sparsty", "did you mean 'sparsity'"):
        MixedSparsityModifier(sparsty=0.5)
    with refused(RecipeError, "wnda", "did you mean 'wanda'"):
        MixedSparsityModifier(sparsity=0.5, method="wnda")
    with refused(RecipeError, "2:4", "quotes"):
        MixedSparsityModifier(sparsity=0.5, levels=[124])
    with refused(RecipeError, "outside [0, 1)", "0.75"):
        MixedSparsityModifier(sparsity=75)
    with refused(RecipeError, "sparsity is missing"):
        MixedSparsityModifier()
    with refused(RecipeError, "block_size", "3:48"):
        MixedSparsityModifier(sparsity=0.5, levels=["3:48", "dense"], method="sparsegpt")


def test_a_missing_dataset_is_named(model):
    from llmcompressor import oneshot

    modifier = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="wanda", allocator="uniform")
    with refused(RecipeError, "needs calibration data", "dataset="):
        oneshot(model=model, recipe=[modifier])


def test_magnitude_with_uniform_levels_needs_no_dataset(model):
    from llmcompressor import oneshot

    modifier = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="magnitude", allocator="uniform")
    oneshot(model=model, recipe=[modifier])
    assert all((groups(m.weight, 4) == 2).all() for m in linears(model).values())


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
def test_the_recipe_that_a_run_leaves_runs_again(model, calibration, tmp_path):
    modifier = MixedSparsityModifier(
        sparsity="5/8", method={"name": "sparsegpt", "block_size": 64}, allocator="uniform", ignore=["k_proj"]
    )
    run(model, [modifier], calibration, output_dir=str(tmp_path / "out"))
    again = load_model(demo_model_path("qwen2"), "float32")
    run(again, str(tmp_path / "out" / "recipe.yaml"), calibration)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_an_allocation_brings_its_own_targets(model, calibration, tmp_path):
    first = MixedSparsityModifier(
        sparsity=0.5, method="magnitude", levels=["2:4"], allocator="uniform", targets=["down_proj"]
    )
    run(model, [first], calibration, output_dir=str(tmp_path / "out"))
    again = load_model(demo_model_path("qwen2"), "float32")
    path = str(tmp_path / "out" / "allocation.json")
    run(again, [MixedSparsityModifier(allocation=path, method="magnitude")], calibration)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_a_target_that_the_levels_cannot_meet_exactly_is_met_to_the_nearest_count(model, calibration):
    modifier = MixedSparsityModifier(sparsity=0.7, method="magnitude", allocator="uniform")
    run(model, [modifier], calibration)
    budget = modifier.outcome.allocation.budget
    assert not budget.exact
    assert modifier.stats.total_zeros == budget.zeros
    assert abs(float(budget.sparsity) - 0.7) < 1e-3


@pytest.mark.slow
def test_two_ranks_are_refused_with_a_reason(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch.distributed as dist; dist.init_process_group('gloo')\n"
        "from torch.utils.data import DataLoader; import torch\n"
        "from llmcompressor import oneshot\n"
        "from msp_plugin import MixedSparsityModifier\n"
        "from msp_plugin.demo import demo_model_path\n"
        "from msp_plugin.models.load import load_model\n"
        "data = DataLoader([{'input_ids': torch.arange(32)}])\n"
        "oneshot(model=load_model(demo_model_path('qwen2')), dataset=data,\n"
        "        recipe=[MixedSparsityModifier(sparsity=0.5, method='wanda', allocator='uniform')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "there are 2 ranks, and each would prune the whole model" in done.stderr


def test_processes_of_torchrun_that_have_not_met_are_refused_as_well(model, calibration, monkeypatch):
    def modifier():
        return MixedSparsityModifier(
            sparsity=0.5, method="magnitude", allocator="uniform", targets=["q_proj"]
        )

    monkeypatch.setenv("WORLD_SIZE", "2")
    run(model, [modifier()], calibration)  # another launcher's count, of jobs that have nothing in common
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(HostError, match="there are 2 ranks"):
        run(model, [modifier()], calibration)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_datasets_dataset_of_ragged_padded_samples_calibrates(
    shuffle, model, calibration, tmp_path, caplog
):
    from datasets import Dataset
    from llmcompressor import oneshot

    lengths = [64, 40, 52, 64, 33, 64, 64, 48]
    rows = [s[:n].tolist() for s, n in zip(calibration.samples, lengths, strict=True)]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    modifier = MixedSparsityModifier(
        sparsity=0.75, method="sparsegpt", allocator={**SEARCH, "tokens": 80}, estimators=FISHER,
        cache=str(tmp_path),
    )  # fmt: skip
    with caplog.at_level("WARNING", logger="msp_plugin"):
        oneshot(
            model=model, recipe=[modifier], dataset=dataset, num_calibration_samples=8, max_seq_length=64,
            processor=load_tokenizer(demo_model_path("qwen2")), shuffle_calibration_samples=shuffle,
        )  # fmt: skip
    assert modifier.stats.sparsity == 0.75 and modifier.outcome.search.loss > 0
    assert ("at random" in caplog.text) == shuffle


def ragged(calibration, side="right", batch_size=4, **options):
    """A loader of samples of several lengths, each padded to 64 tokens, and one of the same samples without padding."""
    lengths = [64, 40, 52, 64, 33, 20, 64, 48]
    padded, plain = [], []
    for sample, length in zip(calibration.samples, lengths, strict=True):
        empty = torch.full((64 - length,), 7)
        mask = [torch.ones(length, dtype=torch.int64), torch.zeros(64 - length, dtype=torch.int64)]
        parts = [sample[:length], empty]
        if side == "left":
            parts, mask = parts[::-1], mask[::-1]
        padded.append({"input_ids": torch.cat(parts), "attention_mask": torch.cat(mask)})
        plain.append({"input_ids": sample[:length]})
    return DataLoader(padded, batch_size=batch_size, **options), DataLoader(plain)


@pytest.mark.parametrize(
    ("side", "method", "level", "pipeline"),
    [
        ("right", "sparsegpt", "2:4", "sequential"),
        ("left", "wanda", "0.5", "sequential"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("left", "sparsegpt", "2:4", "sequential"),
                ("right", "sparsegpt", "2:4", "basic"),
                ("left", "sparsegpt", "2:4", "basic"),
                ("right", "wanda", "2:4", "sequential"),
                ("left", "wanda", "2:4", "sequential"),
                ("right", "wanda", "0.5", "sequential"),
            )
        ),
    ],
)
def test_padding_counts_for_nothing(side, method, level, pipeline, model, calibration):
    from llmcompressor import oneshot

    pruned = []
    for loader in ragged(calibration, side):
        copied = load_model(demo_model_path("qwen2"), "float32")
        modifier = MixedSparsityModifier(sparsity=0.5, levels=[level], method=method, allocator="uniform")
        oneshot(model=copied, recipe=[modifier], dataset=loader, pipeline=pipeline)
        assert hooks(copied) == 0
        pruned.append(linears(copied))
    # SparseGPT decides near ties by the last digit, and what follows from one grows from block to block; with
    # padding in its statistics the weights are 0.23 apart or more, by either method and in every layer.
    most, where = (0.1, "layers.0.") if method == "sparsegpt" else (1e-4, "layers.")
    for name, module in linears(model).items():
        ours, plain = (found[name].weight for found in pruned)
        apart = float((ours - plain).norm() / (module.weight - plain).norm())
        assert apart < most or where not in name, name


@pytest.mark.slow
def test_padding_counts_for_nothing_in_experts_either(calibration, tmp_path):
    from llmcompressor import oneshot
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).float().save_pretrained(tmp_path)
    load_tokenizer(demo_model_path("qwen2")).save_pretrained(tmp_path)
    pruned = []
    for loader in ragged(calibration):
        copied = load_model(tmp_path, "float32")
        modifier = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="wanda", allocator="uniform")
        oneshot(model=copied, recipe=[modifier], dataset=loader, pipeline="basic")
        pruned.append({name: module for name, module in linears(copied).items() if "expert" in name})
    assert len(pruned[0]) == 2 * 4 * 3
    for name, module in pruned[0].items():
        assert ((module.weight == 0) == (pruned[1][name].weight == 0)).float().mean() > 0.999, name


def test_padding_that_is_shuffled_is_said(model, calibration, caplog):
    from llmcompressor import oneshot

    modifier = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="wanda", allocator="uniform")
    loader, _ = ragged(calibration, shuffle=True)
    with caplog.at_level("WARNING", logger="msp_plugin"):
        oneshot(model=model, recipe=[modifier], dataset=loader)
    assert "24.8 % of the calibration batches is padding" in caplog.text and "does not shuffle" in caplog.text


def test_a_token_that_the_model_has_no_embedding_for_is_refused(model, calibration):
    from llmcompressor import oneshot

    from msp_plugin.errors import DataError

    data = [{"input_ids": sample.clone()} for sample in calibration.samples]
    data[5]["input_ids"][9] = 2048
    modifier = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="wanda", allocator="uniform")
    with pytest.raises(DataError, match="has token 2,048, and the model has embeddings for 2,048 tokens"):
        oneshot(model=model, recipe=[modifier], dataset=DataLoader(data))
    assert hooks(model) == 0
