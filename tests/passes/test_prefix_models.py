"""Models whose blocks are called in other ways, or leave something behind."""

import types

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from msp_plugin.passes.by_block import runs_by_block
from msp_plugin.passes.prefix import Prefix, last_outputs, tail_is_exact
from tests.helpers.losses import loss_of, magnitude_levels, own_forwards, two_lengths


class Block(torch.nn.Module):
    """A block with the calling convention that ``kind`` names."""

    def __init__(self, kind, shared):
        super().__init__()
        self.kind, self.shared = kind, shared
        self.proj = torch.nn.Linear(16, 16, bias=False)

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        seen = x
        if self.kind in ("pair", "previous"):
            seen = x + 0.5 * args[1]
        elif self.kind == "leaves something":
            seen = x + self.shared.pop("left", 0.0)
            self.shared["left"] = 0.3 * x
        out = x + torch.tanh(self.proj(seen))
        if self.kind == "in place":
            return x.add_(torch.tanh(self.proj(seen)))
        if self.kind == "tuple":
            return (out,)
        return (out, seen) if self.kind == "pair" else out


class Toy(torch.nn.Module):
    """A model of six blocks."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.shared = kind, {}
        self.config = types.SimpleNamespace(num_hidden_layers=6)
        self.embed = torch.nn.Embedding(64, 16)
        self.layers = torch.nn.ModuleList(Block(kind, self.shared) for _ in range(6))
        self.head = torch.nn.Linear(16, 64, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, use_cache=False):
        x = self.embed(ids)
        other = torch.zeros_like(x)
        if self.kind == "leaves something":
            self.shared.clear()
        for block in self.layers:
            if self.kind == "tuple":
                x = block(x)[0]
            elif self.kind == "keyword":
                x = block(hidden_states=x)
            elif self.kind == "odd keyword":
                x = block(x=x)
            elif self.kind == "pair":
                x, other = block(x, other)
            elif self.kind == "previous":
                x, other = block(x, other), x
            else:
                x = block(x)
        return types.SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize("kind, reused", [
    ("plain", True), ("keyword", True), ("tuple", False), ("pair", False), ("previous", False),
    ("odd keyword", False), ("in place", False), ("leaves something", False),
])  # fmt: skip
def test_a_model_of_another_calling_convention_is_measured_without_reuse(tmp_path, kind, reused):
    model = Toy(kind).eval()
    kept = (0, 1, 2, 0, 1, 2)
    moves = [tuple((k + 1) % 3 if u == b else k for u, k in enumerate(kept)) for b in range(6)]
    setting = (model, magnitude_levels(model, tmp_path), two_lengths())
    with loss_of(*setting, reuse=False) as loss:
        expected = [loss(choice) for choice in (kept, *moves)]
    with loss_of(*setting) as loss:
        loss.set_incumbent(kept)
        found = [loss(choice) for choice in (kept, *moves)]
        assert found == pytest.approx(expected, rel=1e-5)
        assert (loss.block_tokens < loss.forward_tokens) is reused
    assert own_forwards(model) == []


class Remembering(Toy):
    """Each block adds what the one two before it left in the model, where it stays from call to call."""

    def forward(self, ids, use_cache=False):
        x = self.embed(ids)
        for number, block in enumerate(self.layers):
            x = block(x + 0.5 * self.shared[number - 2] if number > 1 else x)
        return types.SimpleNamespace(logits=self.head(x))


def test_what_a_block_leaves_in_the_model_is_not_taken_for_that_of_another_run(tmp_path):
    model = Remembering("plain").eval()
    for number, block in enumerate(model.layers):
        block.proj.register_forward_hook(lambda m, a, y, n=number: model.shared.__setitem__(n, y))
    setting = (model, magnitude_levels(model, tmp_path), two_lengths())
    kept, moved = (0,) * 6, (0, 0, 0, 0, 2, 0)
    with loss_of(*setting, reuse=False) as loss:
        expected = [loss(choice, [0]) for choice in (kept, (2,) * 6, moved)]
    with loss_of(*setting) as loss:
        loss.set_incumbent(kept)
        assert [loss(choice, [0]) for choice in (kept, (2,) * 6, moved)] == expected
        assert loss.block_tokens == loss.forward_tokens


def test_several_streams_of_hidden_states_are_not_taken_for_samples():
    """Gemma 3n's blocks hand on [streams, B, T, D]; the last blocks also read keys of earlier ones."""
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, num_kv_shared_layers=0, layer_types=["full_attention"] * 2, laurel_rank=8,
        activation_sparsity_pattern=[0.0, 0.0], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(8)[None]
    with last_outputs(model) as outputs, torch.no_grad():
        model(ids)
    assert outputs[0].dim() == 4
    with torch.no_grad():
        assert not tail_is_exact(model, ids) and not Prefix(model, 1 << 30).is_exact(ids)
    assert not runs_by_block(model, ids[0])
