"""``--to small``: the slices alone, in the source's own class, compute what the whole does."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import msp_plugin
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.checkpoint.smaller import Small
from msp_plugin.errors import FormatError, ModelError, RecipeError
from msp_plugin.structure.halves import find_halves
from msp_plugin.structure.widths import read_widths
from tests.structure.conftest import TYPES

SLOW = ("llama with biases", "mistral", "qwen3", "seed_oss", "gemma2", "gemma3_text")


def per_layer(path):
    return json.loads((path / "config.json").read_text())["per_layer_config"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TYPES]
)
def test_random_zeros_left_out_change_no_logit_and_no_token(
    name, seed, tiny, zeroing, exported, same_outputs
):
    model = tiny(name, seed)
    zeroing(model).at_random(seed, drop_attention="mixed" not in name)
    source, out = exported(model, Small())
    small = msp_plugin.load(out)
    assert type(small) is type(model) and not small.training
    same_outputs(model, small)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    expected = Small().slices(Checkpoint.open(source))
    tensors = load_file(out / "model.safetensors")
    before = load_file(source / "model.safetensors")
    for key, tensor in before.items():
        if (after := expected.name(key)) is not None:
            assert torch.equal(expected.cut(key, tensor), tensors.pop(after))
    assert not tensors


@pytest.fixture
def cut(tiny, zeroing, exported):
    """A Mistral without block 0's attention, block 1's MLP, a KV head of block 2 and channels of block 3."""
    model = tiny("mistral")
    zeros = zeroing(model)
    zeros.half(0, "attention")
    zeros.half(1, "mlp")
    zeros.head(2, 1)
    for channel in (4, 9, 10):
        zeros.channel(3, channel)
    source, out = exported(model, Small())
    return model, source, out


def test_the_config_says_how_wide_each_block_is_as_transformers_records_it(cut):
    _, _, out = cut
    assert per_layer(out) == {
        "0": {"num_key_value_heads": 0, "skip": ["attention"]},
        "1": {"intermediate_size": 0, "skip": ["mlp"]},
        "2": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "3": {"intermediate_size": 21},
    }
    config = AutoConfig.from_pretrained(out)
    assert [config.per_layer_config[i].intermediate_size for i in range(4)] == [24, 0, 24, 21]


def test_transformers_alone_refuses_it_instead_of_making_weights_up(cut):
    with pytest.raises(Exception, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(cut[2])


def test_a_dropped_half_alone_is_refused_by_transformers_too(tiny, zeroing, exported):
    model = tiny("llama")
    zeroing(model).half(2, "attention")
    _, out = exported(model, Small())
    with pytest.raises(Exception, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(out)


def test_export_json_lists_what_stays_of_each_half(cut):
    structure = Checkpoint.open(cut[2]).manifest.structure
    assert len(structure) == 8
    assert structure["model.layers.0.self_attn"] == {"groups": 3, "kept": "", "module": ""}
    assert structure["model.layers.2.self_attn"]["kept"] == "0,2"
    assert structure["model.layers.3.mlp"]["kept"] == "0-3,5-8,11-23"


def test_the_kv_cache_holds_the_attentions_that_stay(cut):
    small = msp_plugin.load(cut[2])
    ids = torch.arange(12)[None]
    cache = small(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 12
    heads = [layer.keys.shape[1] for layer in cache.layers if layer.get_seq_length()]
    assert heads == [3, 2, 3]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_beams_and_a_static_cache_give_the_same_tokens(options, cut):
    ids = torch.arange(20).view(2, 10)
    fixed = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(*(m.generate(ids, **fixed, **options) for m in (cut[0], msp_plugin.load(cut[2]))))


def test_a_small_model_is_saved_and_loaded_again(cut, tmp_path, same_outputs):
    small = msp_plugin.load(cut[2])
    small.save_pretrained(tmp_path / "again")
    assert per_layer(tmp_path / "again") == per_layer(cut[2])
    same_outputs(cut[0], msp_plugin.load(tmp_path / "again"), generate=False)


def test_a_small_model_has_gradients_and_its_own_halves(cut):
    small = msp_plugin.load(cut[2])
    small(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert all(p.grad is not None for p in small.parameters())
    assert [half.groups for half in find_halves(small)] == [24, 3, 2, 24, 3, 21]


def test_a_small_model_can_be_cut_once_more(cut, tmp_path, zeroing, same_outputs):
    small = msp_plugin.load(cut[2])
    zeroing(small).channel(3, 0)
    zeroing(small).half(2, "mlp")
    small.save_pretrained(tmp_path / "again")
    export_checkpoint(tmp_path / "again", Small(), tmp_path / "smaller")
    assert per_layer(tmp_path / "smaller")["3"] == {"intermediate_size": 20}
    same_outputs(small, msp_plugin.load(tmp_path / "smaller"))


def test_a_packed_checkpoint_is_cut_too(tiny, zeroing, exported, tmp_path, same_outputs):
    model = tiny("llama", intermediate_size=32)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.view(-1, 4)[:, :2] = 0
        model.model.layers[0].mlp.up_proj.weight.view(-1, 4)[:, :2] = 0
    zeroing(model).channel(1, 3)
    _, packed = exported(model.to(torch.bfloat16), Sparse24(), "packed")
    export_checkpoint(packed, Small(), tmp_path / "small")
    assert not Checkpoint.open(tmp_path / "small").packed
    whole, small = (msp_plugin.load(path, "float32") for path in (packed, tmp_path / "small"))
    same_outputs(whole, small, generate=False)


def test_a_bias_keeps_one_channel_of_an_mlp_that_does_nothing_else(tiny, exported, same_outputs):
    model = tiny("llama with biases")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    _, out = exported(model, Small())
    assert per_layer(out)["1"] == {"intermediate_size": 1}
    same_outputs(model, msp_plugin.load(out), generate=False)


def test_channels_come_in_multiples_of_the_quantum(tiny, zeroing, exported, same_outputs):
    model = tiny("qwen2")
    for channel in range(5):
        zeroing(model).channel(0, channel)
    _, out = exported(model, Small(quantum=4))
    assert per_layer(out)["0"] == {"intermediate_size": 20}
    same_outputs(model, msp_plugin.load(out), generate=False)


def test_the_allocation_of_the_whole_model_stays_under_another_name(make_run, zeroing, tmp_path, llama):
    zeroing(llama).head(0, 0)
    run = make_run(tmp_path / "run", llama)
    export_checkpoint(run, Small(), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "allocation.json" not in names and {"allocation.source.json", "run.json"} <= names
    assert Checkpoint.open(tmp_path / "out").allocation is None
    assert "msp_plugin.load" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "intermediate_size"])
def test_sizes_that_a_config_leaves_to_transformers_are_its_defaults(key, zeroing, tmp_path, edit_json):
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    chosen = {"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 24}
    del chosen[key]
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**sizes, **chosen)).float()
    zeroing(model).channel(0, 1)
    model.save_pretrained(tmp_path / "zeros")
    edit_json(tmp_path / "zeros" / "config.json", lambda config: config.pop(key) and None)
    export_checkpoint(tmp_path / "zeros", Small(), tmp_path / "small")
    expected, found = (msp_plugin.load(tmp_path / form, "float32") for form in ("zeros", "small"))
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert per_layer(tmp_path / "small") == {"0": {"intermediate_size": model.config.intermediate_size - 1}}


# what is refused


def refusal(model, exporter, tmp_path):
    model.save_pretrained(tmp_path / "source")
    with pytest.raises((FormatError, ModelError, RecipeError)) as error:
        export_checkpoint(tmp_path / "source", exporter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return error.value.message


def test_a_model_of_which_everything_does_something_is_refused(llama, tmp_path):
    assert "nothing can be left out" in refusal(llama, Small(), tmp_path)


def test_a_model_without_any_attention_is_refused(tiny, zeroing, tmp_path):
    model = tiny("llama")
    for block in range(4):
        zeroing(model).half(block, "attention")
    assert "every attention" in refusal(model, Small(), tmp_path)


def test_a_dropped_attention_among_mixed_windows_is_refused_by_name(tiny, zeroing, tmp_path):
    model = tiny("gemma2 mixed")
    zeroing(model).half(2, "attention")
    message = refusal(model, Small(), tmp_path)
    assert "with and without a sliding window" in message and "model.layers.2.self_attn" in message


def test_a_quantum_that_does_not_divide_is_refused(tiny, zeroing, tmp_path):
    model = tiny("llama")
    zeroing(model).channel(0, 0)
    assert "no multiple of quantum = 7" in refusal(model, Small(quantum=7), tmp_path)
    with pytest.raises(RecipeError, match="quantum = 0"):
        Small(quantum=0)


def test_an_unknown_type_is_refused_by_name(tmp_path):
    from transformers import Olmo2Config, Olmo2ForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    model = Olmo2ForCausalLM(Olmo2Config(**sizes, num_attention_heads=4, pad_token_id=0))
    assert "is of type 'olmo2'" in refusal(model, Small(), tmp_path)


def test_a_quantized_checkpoint_is_refused(cut, tmp_path, edit_json):
    source = cut[1]
    edit_json(source / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(FormatError, match="is quantized"):
        export_checkpoint(source, Small(), tmp_path / "again")


# damage


@pytest.mark.parametrize(
    "entry",
    [
        {"intermediate_size": 0},
        {"intermediate_size": 25},
        {"intermediate_size": "3"},
        {"num_attention_heads": 3, "num_key_value_heads": 1},
        {"num_key_value_heads": 2},
        {"skip": ["norm"]},
        {"sliding_window": 5},
        7,
    ],
)
def test_widths_that_no_export_writes_are_refused(entry, cut, edit_json):
    out = cut[2]
    (out / "export.json").unlink()
    edit_json(out / "config.json", lambda c: c["per_layer_config"].update({"3": entry}))
    with pytest.raises(FormatError, match="per_layer_config is not read here"):
        msp_plugin.load(out)


def test_a_block_that_is_not_there_is_refused(cut):
    config = json.loads((cut[2] / "config.json").read_text())
    config["per_layer_config"]["4"] = {"intermediate_size": 3}
    with pytest.raises(FormatError, match="there is no block 4"):
        read_widths(config, "config.json")


def test_tensors_of_other_widths_than_the_config_are_refused(cut, edit_json):
    out = cut[2]
    (out / "export.json").unlink()
    edit_json(out / "config.json", lambda c: c["per_layer_config"]["3"].update(intermediate_size=20))
    with pytest.raises(ModelError, match="cannot load"):
        msp_plugin.load(out)


def test_changed_bytes_are_refused_before_anything_is_loaded(cut, rewrite):
    rewrite(cut[2], {"model.norm.weight": lambda t: t + 1})
    with pytest.raises(FormatError, match="is not what was exported"):
        msp_plugin.load(cut[2])


@pytest.mark.parametrize("packer", [Sparse24(), Bitmask()], ids=lambda packer: packer.name)
def test_what_is_left_may_be_packed_and_comes_back_bit_for_bit(tmp_path, packer, zeroing):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    model = (
        MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        .float()
        .eval()
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.view(-1, 4)[:, :2] = 0
    zeroing(model).half(0, "attention")
    model.model.layers[1].mlp.down_proj.weight.data[:, :32] = 0
    model.save_pretrained(tmp_path / "zeros")
    export_checkpoint(tmp_path / "zeros", Small(), tmp_path / "small")
    export_checkpoint(tmp_path / "small", packer, tmp_path / "packed")
    small, packed = (msp_plugin.load(tmp_path / form).state_dict() for form in ("small", "packed"))
    assert small.keys() == packed.keys() and all(torch.equal(small[name], packed[name]) for name in small)
    assert Checkpoint.open(tmp_path / "packed").packed
