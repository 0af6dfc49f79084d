"""The data of a ``oneshot``: what the modifier makes of it, and of none."""

import pytest
import torch
from torch.utils.data import DataLoader

from msp_plugin import MixedSparsityModifier
from msp_plugin.demo import demo_model_path
from msp_plugin.errors import DataError, RecipeError
from msp_plugin.models.load import load_model
from msp_plugin.models.source import load_tokenizer
from tests.helpers.oneshot import FISHER, SEARCH, groups, hooks, linears, refused


@pytest.fixture
def model(qwen2_dir):
    return load_model(qwen2_dir, "float32")


@pytest.fixture(scope="module")
def calibration(make_samples):
    return make_samples(8, 64)


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


@pytest.mark.parametrize("shuffle", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_datasets_dataset_of_ragged_padded_samples_calibrates(
    shuffle, model, calibration, tmp_path, caplog, tokenizer
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
            processor=tokenizer, shuffle_calibration_samples=shuffle,
        )  # fmt: skip
    assert modifier.stats.sparsity == 0.75 and modifier.outcome.search.loss > 0
    assert ("random calibration samples" in caplog.text) == shuffle


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
def test_padding_counts_for_nothing(side, method, level, pipeline, model, qwen2_dir, calibration):
    from llmcompressor import oneshot

    pruned = []
    for loader in ragged(calibration, side):
        copied = load_model(qwen2_dir, "float32")
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
    data[5]["input_ids"][9] = 128
    modifier = MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="wanda", allocator="uniform")
    with pytest.raises(DataError, match="has token 128, and the model has embeddings for 128 tokens"):
        oneshot(model=model, recipe=[modifier], dataset=DataLoader(data))
    assert hooks(model) == 0


@pytest.mark.parametrize("ids, found", [
    (torch.full((64,), 10**6), "has token 1,000,000"), (torch.arange(200) % 32, "samples of 200 tokens"),
])  # fmt: skip
def test_samples_beyond_the_models_embeddings_or_learned_positions_are_refused(
    tokenizer, tmp_path, ids, found
):
    from llmcompressor import oneshot
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=128)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    model = load_model(tmp_path / "opt")
    loader = DataLoader([{"input_ids": ids}], batch_size=1)
    modifier = MixedSparsityModifier(sparsity=0.5, allocator="uniform", cache=str(tmp_path))
    with refused(DataError, found):
        oneshot(model=model, recipe=[modifier], dataset=loader)
    assert not hooks(model)
