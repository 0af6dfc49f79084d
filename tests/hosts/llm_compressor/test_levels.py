"""Levels that llm-compressor's own modifiers cannot make, by our functions and beside theirs."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file

from msp_plugin import MixedSparsityModifier
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.packed_export import Sparse24
from msp_plugin.errors import HostError, NumericsError, RecipeError, VerificationError
from msp_plugin.formats.sparse24 import is_packable
from msp_plugin.hosts.llm_compressor.methods import host_method
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Kind, Level, Pattern
from msp_plugin.plan.units import Layer
from msp_plugin.pruning.masks import nm_mask, recount
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve

LEVELS = [Pattern(7, 8), Pattern(3, 8), Pattern(2, 4), Pattern(1, 8)]
OTHERS = [Level.parse(text) for text in ("3:8 in 2:4", "5:16 in 2:4", "0.7", "1/3")]
METHODS = {"sparsegpt": SparseGPT(block_size=16), "wanda": Wanda()}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def linear(out=12, width=32, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(width, out).to(dtype)


def observed(pruner, module, xs):
    statistic = pruner.new_statistic(module)
    for x in xs:
        statistic = pruner.observe(module, x, statistic)
    return statistic


def correlated(width, tokens, dtype):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    return [(torch.randn(2, tokens, width, generator=generator) @ mix).to(dtype) for _ in range(2)]


@pytest.mark.parametrize(
    "width, block_size, dtype",
    [(384, 128, torch.bfloat16), (320, 128, torch.float32), (256, 32, torch.float32)],
)
def test_the_column_loop_is_the_hosts_bit_for_bit(width, block_size, dtype):
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    module, pruner = linear(out=96, width=width, dtype=dtype), SparseGPT(block_size=block_size)
    statistic = observed(pruner, module, correlated(width, 300, dtype))
    statistic.hessian[:, 7] = statistic.hessian[7] = 0  # a dead input
    levels = [Pattern(n, m) for n, m in ((2, 4), (7, 8), (1, 8), (5, 16))]
    for level, found in zip(levels, pruner.prune_levels(module, statistic, levels, "layer"), strict=True):
        _, expected = sparsify_weight(
            module=module, hessians_dict={module: statistic.hessian.clone()}, sparsity=float(level.sparsity),
            prune_n=level.m - level.n, prune_m=level.m, block_size=block_size, dampening_frac=0.01,
            preserve_sparsity_mask=False,
        )  # fmt: skip
        assert torch.equal(found, expected), level


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_our_masks_of_wandas_score_are_the_hosts(level):
    module, pruner = linear(out=64, width=128), Wanda()
    statistic = observed(pruner, module, correlated(128, 200, torch.float32))
    (found,) = pruner.prune_levels(module, statistic, [level], "layer")
    mask = nm_mask(module.weight.abs() * statistic.mean.sqrt(), level)
    assert torch.equal(found, module.weight * mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_that_the_host_cannot_make_are_exact_too(method, dtype):
    pruner, module = METHODS[method], linear(dtype=dtype)
    before = module.weight.detach().clone()
    statistic = observed(pruner, module, correlated(32, 60, dtype))
    for level, pruned in zip(OTHERS, pruner.prune_levels(module, statistic, OTHERS, "layer"), strict=True):
        pruner.check_level(level)
        assert (pruned.dtype, pruned.shape) == (dtype, before.shape) and torch.equal(module.weight, before)
        assert ((pruned != 0).sum(1) == level.kept(Layer("layer", 1, 32))).all() and recount(
            pruned, level
        ).broken is None


@pytest.mark.parametrize("level", OTHERS, ids=str)
def test_wandas_score_ranks_at_every_level(level):
    module, xs = linear(), correlated(32, 60, torch.float32)
    (found,) = Wanda().prune_levels(module, observed(Wanda(), module, xs), [level], "layer")
    norm = torch.cat([x.reshape(-1, 32) for x in xs]).norm(dim=0)
    assert torch.equal(found, module.weight * nm_mask(module.weight.abs() * norm, level))


@pytest.mark.parametrize("method", METHODS)
def test_the_hosts_own_modifier_makes_plain_n_of_m_alone(method):
    host_method(METHODS[method]).check_modifier(Pattern(3, 8))
    for level in OTHERS:
        with pytest.raises(RecipeError, match=f"cannot make level {level}"):
            host_method(METHODS[method]).check_modifier(level)


def test_a_block_holds_the_groups_of_a_level_inside_2_4_too():
    with pytest.raises(RecipeError, match="block_size 8 is no multiple of the M of level 5:16 in 2:4"):
        SparseGPT(block_size=8).check_level(Level.parse("5:16 in 2:4"))
    SparseGPT(block_size=8).check_level(Level.parse("7/10"))


#: The levels of the eight units of the tiny model.
MIXED = ("2:4", "3:8 in 2:4", "7/10", "dense", "dropped", "2:8", "3:8 in 2:4", "1/3")


@pytest.fixture
def llama(llama_dir):
    return load_model(llama_dir, "float32")


@pytest.fixture(params=["llama_dir", pytest.param("qwen2_dir", marks=pytest.mark.slow)])
def model(request):
    return load_model(request.getfixturevalue(request.param), "float32")


@pytest.fixture
def given(tmp_path, llama):
    """The file of an allocation of the tiny model."""

    def make(levels=MIXED, name="given.json"):
        draft = Allocation(prunable_layers(llama), tuple(map(Level.parse, levels)), Fraction(1, 2))
        exact = Allocation(draft.table, draft.levels, draft.budget.sparsity)
        (tmp_path / name).write_text(exact.to_json())
        return str(tmp_path / name)

    return make


@pytest.fixture
def run(tokenizer):
    def run(model, modifiers, data, **kwargs):
        from llmcompressor import oneshot
        from torch.utils.data import DataLoader

        loader = DataLoader([{"input_ids": sample} for sample in data.samples], batch_size=2)
        return oneshot(model=model, recipe=modifiers, dataset=loader, processor=tokenizer, **kwargs)

    return run


@pytest.mark.parametrize("method", [{"name": "sparsegpt", "block_size": 64}, "wanda", "magnitude"])
def test_one_run_prunes_levels_of_all_kinds_to_exact_counts(
    model, data, given, run, method, bits, count_hooks
):
    before, hooks = bits(model), count_hooks(model)
    modifier = MixedSparsityModifier(allocation=given(), method=method)
    run(model, [modifier], data)
    allocation = modifier.outcome.allocation
    for name, level in allocation.by_layer.items():
        weight = model.get_submodule(name).weight
        assert (
            int((weight != 0).sum())
            == level.kept(Layer(name, *weight.shape))
            == weight.numel() - modifier.stats.zeros[name]
        )
        assert recount(weight, level).broken is None
        if isinstance(level, Pattern) and level.kind is Kind.SHARE:
            assert ((weight != 0).sum(1) == level.group(weight.shape[1])[0]).all()
        if level.servable:
            assert is_packable(weight)
    assert modifier.stats.total_zeros == allocation.budget.zeros
    after = bits(model)
    dense = {f"{name}.weight" for name, level in allocation.by_layer.items() if not level.is_dense}
    assert {name for name in after if after[name] != before[name]} == dense
    assert count_hooks(model) == hooks


def test_a_method_that_prunes_whole_units_is_refused_before_any_work(llama, data, given, run, plugins_with):
    class WholeUnits(Wanda):
        def prune_unit(self, inputs, levels):
            return super().prune_unit(inputs, levels)

    options = resolve(Options(allocation=given(), method="wanda"), plugins_with())
    modifier = MixedSparsityModifier.of(replace(options, pruner=WholeUnits()), {})
    with pytest.raises(HostError, match="'wanda' prunes whole units"):
        run(llama, [modifier], data)


@pytest.mark.parametrize("method", [{"name": "sparsegpt", "block_size": 64}, "wanda"])
def test_a_layers_weight_does_not_depend_on_which_engine_prunes_the_layers_beside_it(
    llama_dir, data, given, run, method
):
    """o_proj of block 0 reads what qkv_proj gives: with equal qkv_proj it is equal, whoever prunes gate_up."""
    first = ["2:4", "2:8", *["dense"] * 6]
    second = ["2:4", "2:8", "7/10", *["dense"] * 5]
    weights = []
    for i, levels in enumerate((first, second)):
        model = load_model(llama_dir, "float32")
        run(model, [MixedSparsityModifier(allocation=given(levels, f"{i}.json"), method=method)], data)
        weights.append([model.get_submodule(f"model.layers.0.self_attn.{p}_proj").weight for p in "qkvo"])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("method", [{"name": "sparsegpt", "block_size": 64}, "wanda"])
def test_our_hooks_give_bit_for_bit_what_the_hosts_modifiers_give(
    llama_dir, data, given, run, method, monkeypatch
):
    path, models = given(["2:4", "3:8", "2:8", "7:8", "1:8", "dense", "3:8", "2:4"]), []
    for ours in (False, True):
        if ours:
            monkeypatch.setattr("msp_plugin.hosts.llm_compressor.engines.host_method", lambda pruner: None)
        models.append(load_model(llama_dir, "float32"))
        run(models[-1], [MixedSparsityModifier(allocation=path, method=method)], data)
    theirs = dict(models[0].named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in models[1].named_parameters())


def test_a_mixed_run_is_exported_with_the_levels_inside_2_4_packed(llama, data, given, run, tmp_path):
    method = {"name": "sparsegpt", "block_size": 64}
    run(
        llama,
        [MixedSparsityModifier(allocation=given(), method=method)],
        data,
        output_dir=str(tmp_path / "run"),
    )
    manifest = export_checkpoint(tmp_path / "run", Sparse24(), tmp_path / "packed")
    levels = Allocation.read(tmp_path / "run" / "allocation.json").by_layer
    assert manifest.packed == {name: level.name for name, level in levels.items() if level.servable}
    assert list(manifest.packed.values()).count("3:8 in 2:4") == 3
    assert "level 7/10 does not run on 2:4 kernels" in manifest.kept_dense.values()
    export_checkpoint(tmp_path / "packed", Dense(), tmp_path / "dense")
    found, expected = (load_file(tmp_path / d / "model.safetensors") for d in ("dense", "run"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_search_over_levels_of_all_kinds_meets_its_budget(llama, data, run, tmp_path):
    modifier = MixedSparsityModifier(
        sparsity=0.6, levels=["dense", "2:4", "3:8 in 2:4", 0.7, "1:8"], cache=str(tmp_path),
        method={"name": "sparsegpt", "block_size": 64}, estimators={"fisher": {"samples": 2}},
        allocator={"name": "msp", "population": 3, "generations": 1, "offspring": 2, "tokens": 48},
    )  # fmt: skip
    run(llama, [modifier], data, output_dir=str(tmp_path / "run"))
    assert modifier.stats.total_zeros == modifier.outcome.allocation.budget.zeros
    assert abs(modifier.stats.sparsity - 0.6) < 1e-2
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["sparsity"]["extra_zeros"] == 0


def test_a_uniform_share_that_no_row_divides_is_met_to_the_nearest_count(llama, data, run, tmp_path):
    modifier = MixedSparsityModifier(sparsity=0.7, levels=["0.7"], method="wanda", allocator="uniform")
    run(llama, [modifier], data)
    assert not modifier.outcome.allocation.budget.exact
    for name in modifier.stats.zeros:
        weight = llama.get_submodule(name).weight
        assert ((weight != 0).sum(1) == weight.shape[1] * 3 // 10).all()


def test_a_failure_beside_the_hosts_modifiers_leaves_no_hook(llama, data, given, run, count_hooks):
    hooks = count_hooks(llama)
    method = {"name": "sparsegpt", "block_size": 64, "dampening_frac": 0.0}
    modifier = MixedSparsityModifier(allocation=given(), method=method)
    one = type(data)(tuple(sample[:2] for sample in data.samples[:1]), data.source)
    with pytest.raises(Exception) as error:
        run(llama, [modifier], one)
    chain = [error.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert any(isinstance(link, NumericsError) and "is singular" in str(link) for link in chain)
    assert count_hooks(llama) == hooks


def test_a_level_inside_2_4_that_a_later_step_breaks_is_found(llama, data, given, run):
    from msp_plugin.checkpoint.recount import recount_model

    run(llama, [MixedSparsityModifier(allocation=given(), method="magnitude")], data)
    allocation = Allocation.read(given())
    name = "model.layers.0.self_attn.o_proj"
    weight = llama.get_submodule(name).weight
    weight[0, :8] = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    with pytest.raises(VerificationError, match=f"{name} keeps 3 of 4 in some aligned four"):
        recount_model(llama, allocation, exact=False, after="a later modifier")
