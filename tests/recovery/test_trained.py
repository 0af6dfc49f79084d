"""Training methods on a tiny model: what is kept, what is merged, where they stop."""

import dataclasses

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

pytest.importorskip("peft")

from msp_plugin.errors import DataError, HostError, ModelError, NumericsError, RecipeError
from msp_plugin.recovery.full import Full
from msp_plugin.recovery.lora import LoRA
from msp_plugin.recovery.masked_lora import MaskedLoRA
from msp_plugin.recovery.sparse_delta import SparseDelta, best, best_of_all
from msp_plugin.recovery.spp import SPP
from msp_plugin.recovery.training_text import shuffled
from tests.helpers import models

INF = float("inf")
#: Eight steps of four samples.
SHORT = {"tokens": 8 * 96, "step_tokens": 96, "evaluations": 2, "warmup": 0.0}
METHODS = {
    "masked_lora": MaskedLoRA(rank=4, learning_rate=1e-2, **SHORT),
    "spp": SPP(groups=8, learning_rate=3e-2, **SHORT),
    "sparse_delta": SparseDelta(learning_rate=1e-2, **SHORT),
    "full": Full(learning_rate=1e-3, **SHORT),
    "lora": LoRA(rank=4, masked_merge=True, learning_rate=1e-3, **SHORT),
}


def bytes_of(model):
    return {name: p.detach().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_lowers_the_loss_and_keeps_every_zero(name, case, weights_of, count_hooks):
    inputs = case.inputs()
    before = weights_of(inputs.model, inputs.masks)
    flags = [p.requires_grad for p in inputs.model.parameters()]
    result = METHODS[name].recover(inputs)
    losses = [loss for _, loss in result.curve]
    assert min(losses) < losses[0]
    assert result.tokens == result.curve[-1][0] > 8 * 96 * 3
    assert inputs.masks.check(inputs.model, name) == {}
    changed = 0
    for layer, weight in weights_of(inputs.model, inputs.masks).items():
        zeros = before[layer] == 0
        assert torch.equal(weight[zeros].view(torch.int32), before[layer][zeros].view(torch.int32))
        changed += not torch.equal(weight, before[layer])
    assert changed
    assert type(inputs.model.lm_head) is torch.nn.Linear
    assert [p.requires_grad for p in inputs.model.parameters()] == flags
    assert not inputs.model.training
    assert count_hooks(inputs.model) == count_hooks(case.dense)
    assert [n for n, _ in inputs.model.named_modules()] == [n for n, _ in case.dense.named_modules()]


@pytest.mark.parametrize("name", METHODS)
def test_every_layer_of_a_model_of_more_than_twenty_changes(name, case, weights_of):
    """peft shortens twenty and more names of layers to their endings."""
    case.dense = models.llama(num_hidden_layers=3)
    inputs = case.inputs()
    assert len(inputs.masks.shapes) == 21
    before = weights_of(inputs.model, inputs.masks)
    dataclasses.replace(METHODS[name], tokens=4 * 96, evaluations=1).recover(inputs)
    after = weights_of(inputs.model, inputs.masks)
    same = [layer for layer in before if torch.equal(before[layer], after[layer])]
    assert (
        len(same) < 7 if name == "sparse_delta" else not same
    )  # that one changes the layers that it chooses


def test_a_bfloat16_model_is_trained_with_its_own_rounding(case, weights_of):
    case.dense.to(torch.bfloat16)
    inputs = case.inputs()
    result = METHODS["masked_lora"].recover(inputs)
    losses = [loss for _, loss in result.curve]
    assert min(losses) < losses[0]
    inputs.masks.check(inputs.model, "masked_lora")
    assert {p.dtype for p in inputs.model.parameters()} == {torch.bfloat16}


SLOW = pytest.mark.slow


def test_one_step_of_full_is_one_step_of_adamw_on_the_masked_problem(case):
    method = Full(tokens=96, step_tokens=96, learning_rate=1e-3, weight_decay=0.1, rate="constant_with_warmup",
                  warmup=0.0, norms=False)  # fmt: skip
    inputs = case.inputs(holdout=case.data)
    expected = case.inputs("other")
    layers = [expected.model.get_submodule(n).weight for n in inputs.masks]
    ids = torch.stack([case.data.samples[i] for i in shuffled(12, 4, seed=0)])
    with torch.no_grad():
        dense = case.dense(ids).logits.log_softmax(-1)
    own = expected.model(ids).logits.log_softmax(-1)
    loss = torch.nn.functional.kl_div(own, dense, reduction="sum", log_target=True) / ids.numel()
    loss.backward()
    for weight in layers:
        weight.grad.masked_fill_(weight == 0, 0)
    torch.nn.utils.clip_grad_norm_(layers, 1.0)
    torch.optim.AdamW(layers, lr=1e-3, weight_decay=0.1).step()
    result = method.recover(inputs)
    assert result.curve[1][1] < result.curve[0][1]
    for name, weight in zip(inputs.masks, layers, strict=True):
        torch.testing.assert_close(inputs.model.get_submodule(name).weight, weight, rtol=1e-5, atol=2e-6)


def test_where_the_loss_is_not_finite_the_best_state_before_is_kept(case, weights_of):
    method = dataclasses.replace(METHODS["masked_lora"], norms=False)
    inputs = case.inputs()

    def breaking(step, done, total, note=""):
        if done == 5 * 96:
            inputs.model.model.norm.weight.data.fill_(torch.nan)

    result = method.recover(dataclasses.replace(inputs, progress=breaking))
    assert "in step 6 of 8" in result.notes[0]
    assert result.curve[-1][1] < result.curve[0][1]
    before = case.inputs("other")
    own = weights_of(inputs.model, inputs.masks)
    assert all(bool(w.isfinite().all()) for w in own.values())
    assert any(not torch.equal(own[n], w) for n, w in weights_of(before.model, before.masks).items())


def test_without_a_finite_step_nothing_is_changed(case):
    method = dataclasses.replace(METHODS["masked_lora"], learning_rate=1e30)
    inputs = case.inputs()
    before = bytes_of(inputs.model)
    with pytest.raises(NumericsError, match=r"not finite in step \d of 8"):
        method.recover(inputs)
    assert bytes_of(inputs.model) == before


def test_a_state_that_is_no_better_is_not_kept(case):
    method = dataclasses.replace(METHODS["full"], weight_decay=50.0, patience=1)
    inputs = case.inputs(original=case.inputs("itself").model)  # nothing to learn, and weights that decay
    before = bytes_of(inputs.model)
    result = method.recover(inputs)
    assert result.curve[1][1] > result.curve[0][1]
    assert result.notes == (
        "training ended after 4 of 8 steps: 1 evaluations were no better",
        "no state was better than the pruned model, which is left as it was",
    )
    assert bytes_of(inputs.model) == before


def test_cross_entropy_needs_no_dense_model(case):
    inputs = case.inputs(original=None)
    result = METHODS["masked_lora"].recover(inputs)
    losses = [loss for _, loss in result.curve]
    assert losses[0] > 3
    assert not METHODS["masked_lora"].needs_original
    assert dataclasses.replace(METHODS["masked_lora"], kl_weight=0.5).needs_original
    with pytest.raises(RecipeError, match="no dense model"):
        dataclasses.replace(METHODS["masked_lora"], kl_weight=0.5).recover(inputs)


@SLOW
def test_norms_and_biases_are_trained_where_asked(qwen2, case, make_samples):
    case.dense = qwen2
    for norms in (True, False):
        inputs = case.inputs(f"norms {norms}")
        before = bytes_of(inputs.model)
        dataclasses.replace(METHODS["masked_lora"], norms=norms).recover(inputs)
        moved = {n for n, value in bytes_of(inputs.model).items() if value != before[n]}
        assert ({"model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= moved) is norms
        assert "model.embed_tokens.weight" not in moved


def test_the_choice_of_weights_is_part_of_the_cost(case):
    """A choice by gradients takes a forward and a backward pass, and one of the dense model, of its tokens."""
    method = dataclasses.replace(METHODS["sparse_delta"], tokens=96, score_tokens=120, evaluations=1)
    for kl_weight, passes in ((1.0, 4), (0.0, 3)):
        costs = []
        for score in ("magnitude", "gradient"):
            made = dataclasses.replace(method, score=score, kl_weight=kl_weight)
            result = made.recover(case.inputs(f"{score} {kl_weight}"))
            costs.append([result.tokens, *(tokens for tokens, _ in result.curve)])
        assert [after - before for before, after in zip(*costs, strict=True)] == [passes * 120] * 3


@pytest.mark.parametrize("score", ["gradient", "saliency", "magnitude"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_sparse_delta_trains_the_weights_with_the_best_scores(case, score, by_layer, weights_of):
    method = dataclasses.replace(METHODS["sparse_delta"], score=score, by_layer=by_layer, values=0.1,
                                 score_tokens=96)  # fmt: skip
    inputs = case.inputs()
    change = method.change(inputs)
    model = inputs.model
    ids = torch.stack(case.data.samples[:4])
    own, dense = model(ids).logits.log_softmax(-1), case.dense(ids).logits.log_softmax(-1).detach()
    layers = {name: model.get_submodule(name).weight for name in inputs.masks}
    loss = torch.nn.functional.kl_div(own, dense, reduction="sum", log_target=True)
    gradients = dict(zip(layers, torch.autograd.grad(loss, list(layers.values())), strict=True))
    scores = {
        "gradient": gradients,
        "saliency": {n: gradients[n] * w for n, w in layers.items()},
        "magnitude": layers,
    }[score]
    surviving = {n: torch.where(w == 0, -1.0, scores[n].abs()).detach().flatten() for n, w in layers.items()}
    counts = {n: int((w != 0).sum()) for n, w in layers.items()}
    if by_layer:
        expected = {n: set(s.topk(int(0.1 * counts[n])).indices.tolist()) for n, s in surviving.items()}
    else:
        least = torch.cat(list(surviving.values())).topk(int(0.1 * sum(counts.values()))).values[-1]
        expected = {n: set((s >= least).nonzero()[:, 0].tolist()) for n, s in surviving.items()}
    found = {n: set(change.chosen[n].tolist()) if n in change.counts else set() for n in layers}
    differing = sum(len(found[n] ^ expected[n]) for n in layers)
    assert differing <= 4  # scores that are equal to rounding
    assert sum(change.counts.values()) == pytest.approx(0.1 * sum(counts.values()), abs=len(layers))


def test_the_best_of_all_layers_are_the_best_of_one_list():
    generator = torch.Generator().manual_seed(0)
    layers = {f"l{i}": torch.rand(50 + i, generator=generator) for i in range(5)}
    found = best_of_all(layers.items(), 37)
    least = torch.cat(list(layers.values())).topk(37).values[-1]
    assert {n: p.tolist() for n, p in found.items()} == {
        n: (s >= least).nonzero()[:, 0].tolist() for n, s in layers.items()
    }
    assert best(torch.tensor([0.1, 0.9, 0.5, 0.7]), 2).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MaskedLoRA(rank=65), "rank = 65, but .*k_proj has 32 x 64 weights"),
        (SPP(groups=33), "groups = 33"),
        (SparseDelta(values=10**9), "values = 1,000,000,000, but"),
        (SparseDelta(values=5, by_layer=True), "values = 5 trains no weight"),
        (MaskedLoRA(report_to="tensorboad"), "report_to 'tensorboad' is not installed"),
        (LoRA(), "would fill"),
        (LoRA(rank=65, masked_merge=True), "rank = 65"),
    ],
)
def test_options_that_do_not_fit_the_layers_are_refused_before_any_work(case, method, message):
    inputs = case.inputs()
    with pytest.raises(RecipeError, match=message):
        method.check(inputs.model, inputs.masks)
    with pytest.raises(RecipeError, match=message):
        method.recover(inputs)
    assert not list(inputs.folder.iterdir())


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (MaskedLoRA, "rank", 0), (MaskedLoRA, "tokens", 0), (MaskedLoRA, "learning_rate", 0.0),
        (MaskedLoRA, "kl_weight", 1.5), (MaskedLoRA, "layers", "some"), (MaskedLoRA, "rate", "steps"),
        (MaskedLoRA, "ist_start", "one"), (MaskedLoRA, "warmup", -0.1), (Full, "weight_decay", -0.1),
        (Full, "weight_decay", INF), (Full, "learning_rate", float("nan")), (Full, "learning_rate", INF),
        (MaskedLoRA, "temperature", 0.0), (MaskedLoRA, "alpha", 0.0), (SPP, "groups", 0), (SPP, "scale", -1.0),
        (SparseDelta, "score", "fisher"), (SparseDelta, "values", 0.0), (SparseDelta, "score_tokens", 0),
        (LoRA, "rank", 0), (LoRA, "alpha", INF),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(cls, option, value):
    with pytest.raises(RecipeError, match=option):
        cls(**{option: value}, **({"masked_merge": True} if cls is LoRA else {}))


@pytest.mark.parametrize(
    "method",
    [Full(**SHORT), MaskedLoRA(rank=4, learning_rate=5e-4, **SHORT)],
    ids=lambda method: method.name,
)
def test_vectors_of_a_module_that_has_layers_stay_as_they_are(case, method, weights_of):
    """DiffLlama's attention owns such vectors, as the mixers of Mamba and its kin do."""
    torch.manual_seed(0)
    case.dense = DiffLlamaForCausalLM(DiffLlamaConfig(**models.SIZES)).eval()
    inputs = case.inputs()
    before = weights_of(inputs.model, inputs.masks)
    method.recover(inputs)
    after = weights_of(inputs.model, inputs.masks)
    assert not any(torch.equal(before[layer], after[layer]) for layer in before)
    own, dense = inputs.model.model.layers[0].self_attn, case.dense.model.layers[0].self_attn
    assert torch.equal(own.lambda_q1, dense.lambda_q1)


def test_an_importance_that_nobody_measured_is_no_start(case):
    with pytest.raises(RecipeError, match="the run has measured none"):
        MaskedLoRA(layers="ist", ist_start="sensitivity", **SHORT).recover(case.inputs())


def test_ist_draws_only_blocks_that_train_something(case, weights_of):
    inputs = case.inputs()
    before = weights_of(inputs.model, inputs.masks)
    SparseDelta(values=2, layers="ist", learning_rate=1e-2, **SHORT).recover(inputs)
    after = weights_of(inputs.model, inputs.masks)
    assert sum(int((before[layer] != after[layer]).sum()) for layer in before) == 2


def test_models_that_cannot_be_trained_are_refused(case, monkeypatch):
    inputs = case.inputs()
    with pytest.raises(ModelError, match="float16"):
        MaskedLoRA().check(inputs.model.half(), inputs.masks)
    with monkeypatch.context() as patch, pytest.raises(HostError, match="DeepSpeed"):
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        MaskedLoRA().check(inputs.model.float(), inputs.masks)
    empty = dataclasses.replace(case.inputs(), holdout=type(case.holdout)((), "none"))
    with pytest.raises(DataError, match="held out"):
        METHODS["masked_lora"].recover(empty)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HostError, match="peft is not installed") as caught:
        MaskedLoRA().check(inputs.model.float(), inputs.masks)
    assert "msp_plugin[recovery]" in caught.value.hint


def test_a_training_of_one_step_learns(case):
    inputs = case.inputs()
    before = {name: p.detach().clone() for name, p in inputs.model.named_parameters()}
    found = Full(tokens=96, step_tokens=96, learning_rate=1e-3, evaluations=1).recover(inputs)
    assert found.curve[-1][1] < found.curve[0][1]
    assert any(not torch.equal(p, before[name]) for name, p in inputs.model.named_parameters())
