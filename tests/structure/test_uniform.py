"""``--to uniform``: what plain transformers load, or the reason why a model has no such form."""

import json
import shutil

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    SeedOssForCausalLM,
)

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.smaller import Small, Uniform
from msp_plugin.demo import demo_model_path
from msp_plugin.errors import FormatError, ModelError
from msp_plugin.structure.widths import GLOBAL_ACCESS
from msp_plugin.verify.base import Subject
from msp_plugin.verify.round_trip import RoundTrip


def config(path):
    return json.loads((path / "config.json").read_text())


def everywhere(model, zeros, heads=(), channels=()):
    for block in range(len(model.model.layers)):
        for head in heads:
            zeros.head(block, (head + block) % model.config.num_key_value_heads)
        for channel in channels:
            zeros.channel(block, (channel + 5 * block) % model.config.intermediate_size)


@pytest.mark.parametrize(
    "name",
    [
        "mistral",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mistral with a window", "qwen3", "seed_oss", "gemma")
        ),
    ],
)
def test_equal_widths_and_dropped_blocks_load_in_plain_transformers(
    name, tiny, zeroing, exported, same_outputs
):
    model = tiny(name)
    zeros = zeroing(model)
    everywhere(model, zeros, heads=(1,), channels=range(8))
    zeros.half(2, "attention")
    zeros.half(2, "mlp")
    _, out = exported(model, Uniform())
    found = config(out)
    assert "per_layer_config" not in found and found["num_hidden_layers"] == 3
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
    assert [found[key] for key in sizes] == [4, 2, 16, 8]
    assert len(found.get("layer_types") or [0] * 3) == 3
    small = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(small) is type(model)
    same_outputs(model, small)


def test_a_llama_whose_heads_do_not_divide_it_becomes_a_mistral(tiny, zeroing, exported, same_outputs):
    model = tiny("llama")
    everywhere(model, zeroing(model), heads=(0,))
    _, out = exported(model, Uniform())
    assert config(out)["model_type"] == "mistral" and config(out)["sliding_window"] is None
    small = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(small) is MistralForCausalLM and small.config.num_attention_heads == 6
    same_outputs(model, small)


def test_a_qwen2_that_lost_heads_becomes_a_seed_oss_which_vllm_reads(tiny, zeroing, exported, same_outputs):
    """vLLM's Qwen2 takes the size of a head from their number."""
    model = tiny("qwen2", num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    everywhere(model, zeroing(model), heads=(0,), channels=(3,))
    _, out = exported(model, Uniform())
    small = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(small) is SeedOssForCausalLM and small.config.num_attention_heads == 6
    assert small.config.eos_token_id == model.config.eos_token_id
    same_outputs(model, small)


def test_a_qwen2_that_lost_channels_alone_or_reads_a_window_stays_a_qwen2(
    tiny, zeroing, exported, same_outputs
):
    model = tiny("qwen2", num_attention_heads=4, num_key_value_heads=2)
    everywhere(model, zeroing(model), channels=(3,))
    _, out = exported(model, Uniform())
    same_outputs(model, AutoModelForCausalLM.from_pretrained(out).eval(), generate=False)
    assert config(out)["model_type"] == "qwen2"
    model = tiny("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0)
    everywhere(model, zeroing(model), heads=(0,))
    model.save_pretrained(out.parent / "window")
    export_checkpoint(out.parent / "window", Uniform(), out.parent / "window small")
    small = AutoModelForCausalLM.from_pretrained(out.parent / "window small").eval()
    assert type(small) is Qwen2ForCausalLM
    same_outputs(model, small)


def test_a_llama_whose_config_relies_on_defaults_keeps_them_as_a_mistral(tiny, zeroing, exported):
    model = tiny("llama", max_position_embeddings=2048)
    everywhere(model, zeroing(model), heads=(0,))
    source, _ = exported(model, Uniform())
    raw = config(source)
    raw.pop("max_position_embeddings", None)
    (source / "config.json").write_text(json.dumps(raw))
    export_checkpoint(source, Uniform(), source.parent / "again")
    read = AutoModelForCausalLM.from_pretrained(source.parent / "again").config
    assert read.model_type == "mistral" and read.max_position_embeddings == 2048


def test_a_llama_whose_heads_divide_it_stays_a_llama(tiny, zeroing, exported, same_outputs):
    model = tiny("llama")
    everywhere(model, zeroing(model), heads=(0, 1))
    _, out = exported(model, Uniform())
    small = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(small) is LlamaForCausalLM and small.config.num_attention_heads == 4
    same_outputs(model, small, generate=False)


def test_uneven_widths_are_filled_up_where_that_is_asked_for(tiny, zeroing, exported, same_outputs):
    model = tiny("mistral")
    zeros = zeroing(model)
    everywhere(model, zeros, heads=(1,), channels=range(6))
    zeros.channel(1, 20)
    zeros.half(3, "mlp")
    source, out = exported(model, Uniform(pad=True))
    assert config(out)["intermediate_size"] == 18 and config(out)["num_hidden_layers"] == 4
    same_outputs(model, AutoModelForCausalLM.from_pretrained(out).eval(), generate=False)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp uses 1\d channels, others 18"):
        export_checkpoint(source, Uniform(), out.parent / "other")


def test_a_small_export_of_equal_widths_becomes_uniform(tiny, zeroing, exported, tmp_path, same_outputs):
    model = tiny("mistral")
    everywhere(model, zeroing(model), channels=(1, 2))
    _, small = exported(model, Small())
    export_checkpoint(small, Uniform(), tmp_path / "again")
    assert config(tmp_path / "again")["intermediate_size"] == 22
    same_outputs(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), generate=False)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("name", "written"), [("llama", "mistral"), ("qwen2", "seed_oss")])
def test_a_small_export_becomes_another_type_without_the_record_of_its_widths(
    name, written, dropped, tiny, zeroing, exported, tmp_path, same_outputs
):
    model = tiny(name, num_attention_heads=8, num_key_value_heads=4)
    everywhere(model, zeroing(model), heads=(1,))
    for half in ("attention", "mlp") if dropped else ():
        zeroing(model).half(2, half)
    _, small = exported(model, Small())
    export_checkpoint(small, Uniform(), tmp_path / "again")
    found = config(tmp_path / "again")
    assert found["model_type"] == written
    assert not {"per_layer_config", GLOBAL_ACCESS, "_name_or_path"} & found.keys()
    same_outputs(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), generate=False)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
def test_a_model_that_becomes_another_type_keeps_its_tokenizer(kind, tiny, zeroing, tmp_path):
    """transformers reads Qwen2's tokenizer into a class of its own, whatever tokenizer_config.json says."""
    model = tiny("qwen2", num_attention_heads=8, num_key_value_heads=4)
    everywhere(model, zeroing(model), heads=(1,))
    model.save_pretrained(tmp_path / "source")
    for file in demo_model_path("qwen2").glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "source")
    settings = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    (tmp_path / "source" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": kind})
    )
    export_checkpoint(tmp_path / "source", Uniform(), tmp_path / "out")
    assert config(tmp_path / "out")["model_type"] == "seed_oss"
    text = "def f(x):\n    return  x+12345"
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)(text).input_ids for name in ("source", "out")]
    assert ids[0] == ids[1]
    subject = Subject(*(Checkpoint.open(tmp_path / name) for name in ("out", "source")))
    assert [f.state for f in RoundTrip().run(subject, lambda *a: None) if f.item == "tokenizer"] == ["ok"]
    for file in (tmp_path / "source").glob("tokenizer*.json"):  # as a copy alone would leave it
        shutil.copy(file, tmp_path / "out")
    assert [f.state for f in RoundTrip().run(subject, lambda *a: None) if f.item == "tokenizer"] == ["fail"]


def test_a_small_model_is_not_filled_up_beyond_what_it_has(tiny, zeroing, exported):
    model = tiny("llama")
    zeros = zeroing(model)
    for block, count in ((0, 4), (1, 2), (2, 2), (3, 2)):
        for channel in range(count):
            zeros.channel(block, channel)
    _, small = exported(model, Small())
    error = refused(small, Uniform(pad=True))
    assert "model.layers.0.mlp has fewer channels than 22" in error.message
    assert (
        "only the model that it was cut from can be filled up" in error.hint and "pad=true" not in error.hint
    )
    assert "pad=true" not in refused(small, Uniform()).hint


def test_a_half_that_is_dropped_by_itself_is_refused_by_name(tiny, zeroing, tmp_path):
    model = tiny("llama")
    zeroing(model).half(1, "attention")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(FormatError) as error:
        export_checkpoint(tmp_path / "source", Uniform(), tmp_path / "out")
    assert "model.layers.1.self_attn uses 0 KV heads, others 4" in error.value.message
    assert "--to small" in error.value.hint


def refused(source, exporter):
    with pytest.raises(FormatError) as error:
        export_checkpoint(source, exporter, source.parent / "refused")
    return error.value


def test_a_half_that_is_gone_is_not_filled_up_and_nobody_says_so(tiny, zeroing, exported):
    model = tiny("mistral")
    zeroing(model).half(1, "attention")
    _, small = exported(model, Small())
    error = refused(small, Uniform(pad=True))
    assert "block 1 has no attention" in error.message and "pad=true" not in error.hint
    for block in range(4):
        zeroing(model).half(block, "mlp")
    model.save_pretrained(small.parent / "zeros")
    error = refused(small.parent / "zeros", Uniform(pad=True))
    assert "every mlp does nothing" in error.message and "pad=true" not in error.hint


def test_a_model_that_is_filled_up_to_the_whole_is_refused_for_that(tiny, zeroing, tmp_path):
    model = tiny("mistral")
    zeroing(model).half(1, "attention")
    zeroing(model).channel(2, 3)
    model.save_pretrained(tmp_path / "zeros")
    error = refused(tmp_path / "zeros", Uniform(pad=True))
    assert "3 of 3 KV heads or channels of model.layers.1.self_attn do nothing" in error.message
    assert "every KV head and channel" not in error.message and "--to small" in error.hint


def test_a_gemma_that_its_config_cannot_hold_is_refused(tiny, zeroing, tmp_path):
    model = tiny("gemma2")
    everywhere(model, zeroing(model), heads=(0,))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match="transformers refuses the config of the smaller gemma2 model"):
        export_checkpoint(tmp_path / "source", Uniform(), tmp_path / "out")


def test_a_llama_with_biases_is_no_mistral(tiny, zeroing, tmp_path):
    model = tiny("llama with biases")
    everywhere(model, zeroing(model), heads=(0,))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match="transformers refuses the config"):
        export_checkpoint(tmp_path / "source", Uniform(), tmp_path / "out")
