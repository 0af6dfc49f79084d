"""Families of models as tiny random ones: pruned, saved, loaded, exported and verified, or refused by name.

The table in msp_plugin/README.md is made from FAMILIES; a test holds it against that.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import msp_plugin
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.data.samples import Text
from msp_plugin.demo import demo_model_path
from msp_plugin.errors import FormatError, ModelError
from msp_plugin.models.layers import decoder_blocks, fused_experts, prunable_layers
from msp_plugin.models.source import load_tokenizer
from msp_plugin.plan.allocation import Allocation
from msp_plugin.verify.base import SKIP, Subject, run_checks
from msp_plugin.verify.round_trip import RoundTrip
from msp_plugin.verify.structure import Structure

pytest.importorskip("llmcompressor")

README = Path(msp_plugin.__file__).parent / "README.md"
VOCABULARY = 2048  # of the tokenizer of the embedded model
PLAIN = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
HEADS = {**PLAIN, "head_dim": 16}
EXPERTS = {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL = {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {**PLAIN, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    **HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    **PLAIN, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
DEEPSEEK = {**{key: value for key, value in ROUTED.items() if key != "head_dim"}, **LATENT}
OLDER = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LINEAR = {
    **HEADS, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
JAMBA = {
    **PLAIN, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
    "use_mamba_kernels": False,
}  # fmt: skip
SHARED = {
    **HEADS, "num_hidden_layers": 4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
PER_LAYER = {
    **SHARED,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"] * 2,
}
GEMMA3N = {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
#: As deep as the language models, so that it could be taken for one.
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 14, "intermediate_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}


def seeing(text, vision, sizes=HEADS, **more):
    """Return the sizes of a model of images and text."""
    return {
        "text_config": {**sizes, "model_type": text, "vocab_size": VOCABULARY},
        "vision_config": vision,
        **more,
    }


@dataclass(frozen=True)
class Family:
    """How a family is made and pruned, and what must come of it.

    ``oneshot``: pruned by llm-compressor's own entry point, which splits experts. ``refused``: what the error says;
    the note is its reason in the table.
    """

    sizes: dict = field(default_factory=lambda: HEADS)
    model_type: str = ""
    oneshot: bool = False
    ignore: tuple = ()
    refused: str = ""
    note: str = ""


SPLIT = "in llm-compressor's `oneshot`, which splits the experts"
TEXT_ONLY = "calibrated on text; the vision tower stays as it is"
FUSED = "its checkpoint holds the experts fused, and transformers could not load what llm-compressor saves"
NO_DT = "with `ignore: [dt_proj]`, whose input no method sees (without it: refused by name)"
IN_ONE = "by `msp prune`, in one pass: later blocks read keys and values of earlier ones"
FAMILIES = {
    **{name: Family() for name in (
        "apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm",
        "glm4", "granite", "granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "jais2", "llama", "ministral",
        "ministral3", "mistral", "nanochat", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
        "vaultgemma", "bitnet",
    )},
    **{name: Family(PLAIN) for name in ("diffllama", "nemotron", "persimmon", "phi", "stablelm", "starcoder2")},
    **{name: Family(LATENT) for name in ("minicpm3", "youtu")},
    "biogpt": Family(PLAIN), "bloom": Family({"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "codegen": Family({**OLDER, "rotary_dim": 8, "n_ctx": 64}), "falcon": Family(PLAIN),
    "gpt_bigcode": Family(OLDER), "gpt_neox": Family(PLAIN), "gptj": Family({**OLDER, "rotary_dim": 8}),
    "gpt_neo": Family({"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
                       "attention_types": [[["global", "local"], 1]]}),
    "mpt": Family({"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "opt": Family({**PLAIN, "ffn_dim": 128, "word_embed_proj_dim": 32}),
    "xglm": Family({"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}),
    "gpt2": Family(OLDER, refused="hold no linear; their weights are in Conv1D",
                   note="its weights are in transformers' Conv1D, which is no linear"),
    # convolutions, recurrence, linear attention
    "bamba": Family({**PLAIN, "attn_layer_indices": [1], **MAMBA}),
    "falcon_h1": Family({**HEADS, "mamba_d_ssm": 128, **MAMBA}),
    "falcon_mamba": Family({"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}, ignore=("dt_proj",), note=NO_DT),
    "granitemoehybrid": Family({**PLAIN, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
                                "shared_intermediate_size": 64, **MAMBA}, note="without routed experts"),
    "jamba": Family(JAMBA, oneshot=True, ignore=("dt_proj",), note=f"{SPLIT}; {NO_DT}"),
    "lfm2": Family({**PLAIN, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
    "mamba": Family({"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}, ignore=("dt_proj",), note=NO_DT),
    "mamba2": Family({"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16,
                      "n_groups": 1, "chunk_size": 16}),
    "olmo_hybrid": Family(LINEAR), "qwen3_5_text": Family(LINEAR),
    "recurrent_gemma": Family({**HEADS, "lru_width": 64, "attention_window_size": 32}),
    "rwkv": Family({"hidden_size": 64, "num_hidden_layers": 2, "context_length": 64, "attention_hidden_size": 64,
                    "intermediate_size": 128}),
    "xlstm": Family({"hidden_size": 64, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4, "embedding_dim": 64}),
    "zamba2": Family({**HEADS, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 16,
                      "layers_block_type": ["mamba", "hybrid"]}),
    # mixtures of experts
    "deepseek_v2": Family(DEEPSEEK, oneshot=True, note=SPLIT), "deepseek_v3": Family(DEEPSEEK, oneshot=True, note=SPLIT),
    "dots1": Family(ROUTED, oneshot=True, note=SPLIT), "glm4_moe": Family(ROUTED, oneshot=True, note=SPLIT),
    "ernie4_5_moe": Family({**HEADS, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64,
                            "moe_num_shared_experts": 1}, oneshot=True, note=SPLIT),
    "flex_olmo": Family(SMALL_EXPERTS, oneshot=True, note=SPLIT), "olmoe": Family(SMALL_EXPERTS, oneshot=True, note=SPLIT),
    "lfm2_moe": Family({**PLAIN, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                        "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, oneshot=True, note=SPLIT),
    "minimax_m2": Family({**LOCAL, "head_dim": 16, "rotary_dim": 8}, oneshot=True, note=SPLIT),
    "mixtral": Family(LOCAL, oneshot=True, note=SPLIT),
    "nemotron_h": Family({**HEADS, "num_hidden_layers": 4, "hybrid_override_pattern": "M*-E", "n_routed_experts": 4,
                          "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mamba_num_heads": 8,
                          "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
                         oneshot=True, note=SPLIT),
    "phimoe": Family(LOCAL, oneshot=True, note=SPLIT),
    "qwen2_moe": Family({**EXPERTS, "shared_expert_intermediate_size": 64}, oneshot=True, note=SPLIT),
    "qwen3_moe": Family(EXPERTS, oneshot=True, note=SPLIT),
    "qwen3_next": Family({**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 64}, oneshot=True, note=SPLIT),
    "dbrx": Family({"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
                    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
                   oneshot=True, refused="holds fused experts", note="llm-compressor does not split its experts"),
    "gpt_oss": Family({**LOCAL, "head_dim": 16}, oneshot=True, refused="stores its experts fused", note=FUSED),
    "granitemoe": Family(LOCAL, oneshot=True, refused="stores its experts fused", note=FUSED),
    # inputs of each layer, shared keys and values
    "gemma3n_text": Family({**SHARED, **GEMMA3N}, note=IN_ONE), "gemma4_text": Family(SHARED, note=IN_ONE),
    "gemma4_text without sharing": Family({**PER_LAYER, "global_head_dim": 16}, "gemma4_text"),
    "gemma3n_text in oneshot": Family({**SHARED, **GEMMA3N}, "gemma3n_text", oneshot=True,
                                      refused="read keys and values of earlier ones",
                                      note="llm-compressor's calibration by blocks loses the shared keys and values"),
    # images and text
    "gemma3": Family(seeing("gemma3_text", SIGLIP, mm_tokens_per_image=4), note=TEXT_ONLY),
    "gemma4": Family(seeing("gemma4_text", {**VISION, "num_key_value_heads": 2, "head_dim": 16}, PER_LAYER,
                            audio_config=None), note=TEXT_ONLY),
    "idefics3": Family(seeing("llama", VISION), note=TEXT_ONLY),
    "internvl": Family(seeing("qwen2", {**VISION, "model_type": "internvl_vision", "image_size": [28, 28],
                                        "patch_size": [14, 14]}), note=TEXT_ONLY),
    "llava": Family(seeing("llama", CLIP), note=TEXT_ONLY),
    "llava_next": Family(seeing("mistral", CLIP, image_grid_pinpoints=[[28, 28]]), note=TEXT_ONLY),
    "mistral3": Family(seeing("mistral", {**VISION, "model_type": "pixtral", "head_dim": 16}), note=TEXT_ONLY),
    "paligemma": Family(seeing("gemma", {**SIGLIP, "projection_dim": 64}, projection_dim=64), note=TEXT_ONLY),
    "qwen2_vl": Family(seeing("qwen2_vl_text", {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2,
                                                "patch_size": 14}, {**HEADS, **ROPE}), note=TEXT_ONLY),
    "qwen2_5_vl": Family(seeing("qwen2_5_vl_text", {**QWEN_VISION, "fullatt_block_indexes": [1]}, {**HEADS, **ROPE}),
                         note=TEXT_ONLY),
    "qwen3_vl": Family(seeing("qwen3_vl_text", {**QWEN_VISION, "deepstack_visual_indexes": [0]}, {**HEADS, **ROPE}),
                       note=TEXT_ONLY),
    "qwen3_5": Family(seeing("qwen3_5_text", QWEN_VISION, LINEAR), note=TEXT_ONLY),
    "smolvlm": Family(seeing("llama", VISION), note=TEXT_ONLY),
    "llama4": Family(seeing("llama4_text", {**VISION, "vision_output_dim": 64, "projector_input_dim": 64,
                                            "projector_output_dim": 64, "pixel_shuffle_ratio": 0.5},
                            {**LOCAL, "head_dim": 16, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1}),
                     oneshot=True, refused="stores its experts fused", note=FUSED),
    "mllama": Family(seeing("mllama_text_model",
                            {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                             "num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14,
                             "vision_output_dim": 64, "intermediate_layers_indices": [0],
                             "supported_aspect_ratios": [[1, 1]]},
                            {**PLAIN, "cross_attention_layers": [1], "pad_token_id": 0}),
                     refused="over text does not call 7 layers",
                     note="text alone calls no layer of its cross-attention blocks; with those in `ignore` it works"),
}  # fmt: skip
#: One or two of each kind: the slow tests search these and prune all, the quick ones prune QUICK.
KINDS = (
    "llama", "phi3", "bloom", "minicpm3", "mamba", "lfm2", "qwen3_5_text", "zamba2", "mixtral", "deepseek_v3",
    "gemma3n_text", "llava",
)  # fmt: skip
QUICK = ("llama", "mamba", "mixtral")
WORKING = [name for name, family in FAMILIES.items() if not family.refused]
UNTESTED = {
    "gemma3n": "with its audio and vision towers, which need timm",
    "all others": "what transformers loads as a causal language model, or as one of images and text, is tried alike",
}


def make(name):
    """Return a tiny random model of a family, whose weights are large enough to tell its layers' outputs apart."""
    sizes = FAMILIES[name].sizes
    config = AutoConfig.for_model(
        FAMILIES[name].model_type or name,
        **({} if "text_config" in sizes else {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
                                              "eos_token_id": 2}),
        **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if "text_config" in sizes else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
        model.get_input_embeddings().weight[0] = (
            0  # the padding's, which transformers zeroes when it loads some
        )
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(10, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"The {a} {b} sat on the {c} and said nothing more about it.\n\n" for a in ("old", "red", "wet")
             for b in ("cat", "dog", "king", "ship") for c in ("mat", "log", "sea"))  # fmt: skip
    path.write_text("".join(lines), encoding="utf-8")
    return Text(str(path), samples=6, length=32, test_samples=0, batch=2)


@pytest.fixture
def prune(tmp_path, ids, text):
    """Write a family's model, prune it as its row says, and return the directories before and after."""

    def prune(name, **options):
        family, source, out = FAMILIES[name], tmp_path / "source", tmp_path / "out"
        make(name).save_pretrained(source)
        tokenizer = load_tokenizer(demo_model_path("llama"))
        tokenizer.save_pretrained(source)
        options = {"sparsity": "1/2", "levels": ["2:4"], "method": "wanda", "allocator": "uniform",
                   "ignore": list(family.ignore), "cache": str(tmp_path / "cache"), **options}  # fmt: skip
        if family.oneshot:
            from llmcompressor import oneshot

            loader = DataLoader([{"input_ids": sample} for sample in ids], batch_size=2)
            modifier = msp_plugin.MixedSparsityModifier(**options)
            oneshot(
                model=load(source),
                recipe=[modifier],
                dataset=loader,
                processor=tokenizer,
                output_dir=str(out),
            )
        else:
            msp_plugin.prune(source, text, out, baseline=False, **options)
        return source, out

    return prune


@torch.no_grad()
def logits(directory, ids):
    return load(directory)(ids[:2], use_cache=False).logits


def check(directory, reference):
    """Raise unless structure and round trip hold, bit for bit, with every layer looked at."""
    found = run_checks(
        Subject(Checkpoint.open(directory), Checkpoint.open(reference)), [Structure(), RoundTrip()]
    )
    assert all(result.passed for result in found), found
    looked_at = {finding.item for result in found for finding in result.findings if finding.state != SKIP}
    assert looked_at >= {"layers", "zeros", "reference"}


def check_everything(source, out, ids):
    before, after = Checkpoint.open(source).tensors, Checkpoint.open(out)
    others = [name for name in before if name in after.tensors
              and name.removesuffix(".weight") not in after.allocation.by_layer]  # fmt: skip
    assert others and all(torch.equal(before.read(name), after.tensors.read(name)) for name in others)
    pruned = logits(out, ids)
    assert pruned.isfinite().all() and not torch.equal(pruned, logits(source, ids))
    for exporter in (Dense(), Sparse24(), Bitmask()):
        directory = out.parent / exporter.name
        try:
            export_checkpoint(out, exporter, directory)
        except FormatError as error:  # a model of experts alone, which are served dense
            assert "experts are served dense" in str(error)
            continue
        check(directory, out)
        assert torch.equal(logits(directory, ids), pruned)
    check(out, out)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WORKING]
)
def test_a_family_is_pruned_saved_loaded_exported_and_verified(name, prune, ids):
    source, out = prune(name)
    check_everything(source, out, ids)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refused])
def test_a_family_that_cannot_be_pruned_is_refused_by_name(name, prune):
    with pytest.raises(ModelError, match=FAMILIES[name].refused) as error:
        prune(name)
    assert type(make(name)).__name__ in error.value.message and error.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_family_is_searched_by_msp_and_pruned_by_sparsegpt(name, prune, ids):
    allocator = {"name": "msp", "population": 3, "generations": 1, "offspring": 2, "tokens": 64}
    source, out = prune(name, levels=["dense", "2:4", "1:4"], method="sparsegpt", allocator=allocator)
    check_everything(source, out, ids)


def table():
    rows = [f"| `{name}` | {'refused' if family.refused else 'works'} | {family.note} |"
            for name, family in sorted(FAMILIES.items())]  # fmt: skip
    rows += [f"| {name} | untested | {note} |" for name, note in UNTESTED.items()]
    return "\n".join(["| family | result | how, or why not |", "|---|---|---|", *rows])


def test_the_readme_has_the_table_of_the_families():
    assert table() in README.read_text(encoding="utf-8"), f"put this into {README}:\n{table()}"


def test_layers_that_text_does_not_run_are_pruned_by_their_weights(prune, ids):
    """Mllama's cross-attention blocks run with images only, and magnitude reads no inputs."""
    allocator = {"name": "msp", "population": 3, "generations": 1, "offspring": 2, "tokens": 64}
    _, out = prune("mllama", levels=["dense", "2:4", "1:4"], method="magnitude", allocator=allocator)
    assert any("cross_attn" in layer for layer in Allocation.read(out / "allocation.json").by_layer)
    check(out, out)


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx", "mixtral", "llama4"])
def test_a_model_of_fused_experts_is_sent_to_oneshot(name):
    model = make(name)
    assert fused_experts(model) and decoder_blocks(model)[0].endswith(("layers", "blocks"))
    with pytest.raises(ModelError, match=f"{type(model).__name__} holds fused experts") as error:
        prunable_layers(model)
    assert "oneshot" in error.value.hint
