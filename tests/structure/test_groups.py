"""The groups of a model's half-blocks, and the models and options that widths are refused for."""

from fractions import Fraction

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Phi3Config

from msp_plugin.errors import ModelError, RecipeError, VerificationError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level
from msp_plugin.plugins.manager import Plugins
from msp_plugin.search.allocate import check_model, make_problem
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve
from msp_plugin.structure.groups import with_groups

PLUGINS = Plugins(entry_points=False)


def plan(**options):
    options = {"sparsity": 0.25, "method": "l2", "levels": ["width"], "quantum": 8, **options}
    return resolve(Options.parse(options), PLUGINS)


def test_the_groups_of_a_half_are_its_kv_heads_or_its_channels(tiny):
    model = tiny("mistral")  # 6 query heads, 3 KV heads of 8, hidden size 32, 24 channels
    attention, mlp = with_groups(model, prunable_layers(model, granularity="half"), 4).units[:2]
    assert [(a.name.rpartition(".")[2], a.groups.count, not a.inner) for a in attention.layers] == [
        ("q_proj", 3, False),
        ("k_proj", 3, False),
        ("v_proj", 3, False),
        ("o_proj", 3, True),
    ]
    assert [(a.groups.count, a.groups.quantum, not a.inner) for a in mlp.layers] == [
        (24, 4, False),
        (24, 4, False),
        (24, 4, True),
    ]


def test_the_units_of_a_plan_with_widths_are_half_blocks_with_groups(tiny):
    table = check_model(tiny("qwen3"), plan())
    assert len(table) == 8 and all(unit.groups for unit in table)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"quantum": 7}, "24 channels, no multiple of quantum = 7"),
        ({"quantum": 64}, "24 channels, no multiple of quantum = 64"),
        ({"ignore": ["o_proj"]}, "leave out layers of 4 units that may be 7/8 wide or "),
        (
            {"levels": ["dense", "1/99 wide"], "quantum": 1},
            "level 1/99 wide does not fit 8 of 8 units: it keeps none",
        ),
        ({"levels": ["dense", "99/100 wide"], "quantum": 24}, "keeps all of the 3 heads or channels"),
        ({"levels": ["dense", "1/2 wide 1:32"]}, "level 1/2 wide 1:32 does not fit 8 of 8 units"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(tiny, options, words):
    with pytest.raises(RecipeError, match=words):
        check_model(tiny("mistral"), plan(**options))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "wanda"}, "method 'wanda' cannot make level 7/8 wide"),
        ({"granularity": "layer"}, "level 7/8 wide is for granularity half, not for granularity layer"),
        ({"granularity": "block"}, "not for granularity block"),
        ({"levels": ["2:4", "dense"]}, "quantum = 8 would have no effect: no level is a width"),
        ({"quantum": 0}, "quantum = 0"),
        ({"method": {"name": "llm_pruner", "taylor": "third"}}, "Taylor score 'third' is unknown"),
        ({"method": {"name": "obs", "damping": 0}}, "damping = 0.0 must be above 0"),
        ({"method": {"name": "obs", "rounds": 0}}, "rounds = 0 at least 1"),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(options, words):
    with pytest.raises(RecipeError, match=words):
        plan(**options)


@pytest.mark.parametrize(
    "config, words",
    [
        (
            Phi3Config(
                vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, pad_token_id=0,
            ),
            "Phi3ForCausalLM fuses projections in gate_up_proj, qkv_proj",
        ),
        (
            MixtralConfig(
                vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, num_local_experts=2,
            ),
            "fused experts",
        ),
    ],
)  # fmt: skip
def test_models_whose_heads_or_channels_are_coupled_otherwise_are_refused_by_name(config, words):
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=words):
        check_model(AutoModelForCausalLM.from_config(config).eval(), plan())


def test_protected_layers_keep_their_whole_half(tiny):
    model, made = tiny("mistral"), plan(protect=["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.*"])
    problem = make_problem(model, check_model(model, made), made)
    assert problem.allowed[:2].sum(axis=1).tolist() == [1, 1] and problem.uniform()[:2] == (0, 0)
    assert problem.allowed[2:].sum(axis=1).min() > 1


def test_a_finished_allocation_with_other_groups_is_refused(tiny, tmp_path):
    model = tiny("mistral")
    table = with_groups(model, prunable_layers(model, granularity="half"), 8)
    levels = (Level.parse("2/3 wide"), *[Level.parse("dense")] * 7)
    text = Allocation(table, levels, Fraction(1, 50)).to_json()
    right, wrong = tmp_path / "right.json", tmp_path / "wrong.json"
    right.write_text(text)
    check_model(model, resolve(Options(method="l2", allocation=str(right)), PLUGINS))
    wrong.write_text(text.replace('"count": 24', '"count": 8').replace('"quantum": 8', '"quantum": 4'))
    with pytest.raises(
        VerificationError, match=r"gives model.layers.0.mlp.gate_proj other heads or channels"
    ):
        check_model(model, resolve(Options(method="l2", allocation=str(wrong)), PLUGINS))
