"""The quality check: perplexity, KL to the reference and to the original."""

import json
import math

import pytest
import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.verify.base import Subject, run_checks
from msp_plugin.verify.quality import Quality

DOWN = "model.layers.1.mlp.down_proj"  # 3:8, dense


def record(path, edit_json, text, value, key="mixed", dtype="float32"):
    change = {
        "test": {"fingerprint": text.fingerprint}, "perplexity": {key: value}, "model": {"dtype": dtype},
    }  # fmt: skip
    edit_json(path / "run.json", lambda data: data.update(change))


def test_quality_measures_perplexity_and_no_divergence_from_the_reference(
    check, states, run_dir, packed_dir, llama_dir, text
):
    rows = check(Quality(), packed_dir, run_dir, text=text, original=str(llama_dir))
    assert states(rows) == {"perplexity": "skip", "reference": "ok", "original": "skip"}
    assert "--set quality.max_kl=" in rows["original"].expected
    model, original = load(run_dir, "float32"), load(llama_dir, "float32")
    value, before, kl = perplexity(model, text), perplexity(original, text), mean_kl(original, model, text)
    assert rows["perplexity"].details == {
        "perplexity": value, "tokens": text.tokens, "fingerprint": text.fingerprint,
    }  # fmt: skip
    assert rows["reference"].details == {"kl": 0.0, "perplexity": value}
    assert rows["original"].details == {"kl": kl, "perplexity": before} and kl > 0.01
    assert f"{before:.4f} -> {value:.4f}" in rows["original"].found
    assert states(check(Quality(), packed_dir, text=text)) == {"perplexity": "skip"}


@pytest.mark.parametrize("name", ["model.norm.weight", f"{DOWN}.weight"])
def test_any_change_of_the_logits_fails_against_the_reference(
    check, states, name, run_dir, packed_dir, copied, rewrite, text
):
    reference = rewrite(copied(run_dir), {name: lambda t: t * 1.01})
    rows = check(Quality(), packed_dir, reference, text=text)
    assert states(rows) == {"perplexity": "skip", "reference": "fail"}
    assert 0 < rows["reference"].details["kl"] < 0.1


def test_the_cost_of_pruning_may_be_bounded(check, packed_dir, llama_dir, text):
    kl = check(Quality(), packed_dir, text=text, original=str(llama_dir))["original"].details["kl"]
    for bound, state in ((kl, "ok"), (0.999 * kl, "fail"), (0.0, "fail")):
        row = check(Quality(max_kl=bound), packed_dir, text=text, original=str(llama_dir))["original"]
        assert row.state == state and row.expected == f"KL at most {bound:g}"


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(RecipeError, match="max_kl"):
        Quality(max_kl=bound)


@pytest.mark.parametrize("key", ["mixed", "result"])
@pytest.mark.parametrize(("factor", "state"), [(1, "ok"), (1.0009, "ok"), (1.0012, "fail"), (0.9988, "fail")])
def test_the_perplexity_of_the_run_is_held_against_ours(
    check, key, factor, state, run_dir, copied, edit_json, text
):
    value, path = perplexity(load(run_dir, "float32"), text), copied(run_dir)
    record(path, edit_json, text, value * factor, key)
    row = check(Quality(), path, text=text)["perplexity"]
    assert row.state == state and row.expected == f"{value * factor:.4f} (run.json, same text)"


@pytest.mark.parametrize(("run_in", "measured_in"), [("auto", "bfloat16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize(("off", "state"), [(1.04, "ok"), (0.96, "ok"), (1.06, "fail"), (0.95, "fail")])
def test_the_perplexity_of_a_run_in_another_dtype_may_differ_by_a_twentieth(
    check, run_in, measured_in, off, state, run_dir, copied, edit_json, text
):
    path, value = copied(run_dir), perplexity(load(run_dir, "float32"), text)
    record(path, edit_json, text, off * value, dtype=run_in)
    row = check(Quality(), path, text=text)["perplexity"]
    assert row.state == state
    assert row.expected == f"within 5 % of {off * value:.4f} in {measured_in} (run.json, same text)"
    assert check(Quality(dtype=measured_in), path, text=text)["perplexity"].state == "fail"


def test_weights_of_noise_fail_against_a_run_in_another_dtype(
    check, run_dir, copied, rewrite, edit_json, text
):
    def noise(weight):
        return torch.where(weight == 0, weight, torch.randn(weight.shape, dtype=weight.dtype))

    path = rewrite(copied(run_dir), {f"{DOWN}.weight": noise, "lm_head.weight": noise})
    record(path, edit_json, text, perplexity(load(run_dir, "float32"), text), dtype="bfloat16")
    assert check(Quality(), path, text=text)["perplexity"].state == "fail"


def test_the_perplexity_of_another_text_says_nothing(check, run_dir, copied, edit_json, text, make_samples):
    path = copied(run_dir)
    record(path, edit_json, make_samples(4, 24, 4), 1.0)
    row = check(Quality(), path, text=text)["perplexity"]
    assert row.state == "skip" and "give the run's test text" in row.expected
    for content in ("[]", '{"test": 3}', '{"test": {}, "perplexity": null}'):
        (path / "run.json").write_text(content)
        assert check(Quality(), path, text=text)["perplexity"] == row
    for quality in ({"mixed": None}, None, "3", 3, {"mixed": "3"}):
        found = {"test": {"fingerprint": text.fingerprint}, "perplexity": quality}
        (path / "run.json").write_text(json.dumps(found))
        assert check(Quality(), path, text=text)["perplexity"] == row


def test_a_model_that_computes_no_number_fails(check, states, spoil, run_dir, copied, rewrite, text):
    path = rewrite(copied(run_dir), {"model.norm.weight": spoil(float("nan"), 3)})
    rows = check(Quality(), path, text=text)
    assert states(rows) == {"quality": "fail"} and "not a number" in rows["quality"].found


def test_a_perplexity_without_bounds_fails_and_its_json_is_json(
    states, run_dir, copied, rewrite, llama_dir, text
):
    path = rewrite(copied(run_dir), {"lm_head.weight": lambda t: t * 1e5})
    subject = Subject(Checkpoint.open(path), text=text, original=str(llama_dir))
    (result,) = run_checks(subject, [Quality()])
    assert states({row.item: row for row in result.findings}) == {"perplexity": "fail", "original": "fail"}
    assert (
        json.loads(json.dumps(result.to_dict(), allow_nan=False))["findings"][0]["details"]["perplexity"]
        is None
    )


def test_the_divergence_is_the_mean_over_all_positions(llama, make_samples):
    import copy

    text = CalibrationSet((*make_samples(3, 24, 1).samples, *make_samples(2, 10, 2).samples), "two lengths")
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight += 0.05
        other.model.norm.weight *= 1.1
        total = 0.0
        for sample in text.samples:
            p, q = (m(sample[None]).logits[0].double().log_softmax(-1) for m in (llama, other))
            total += float((p.exp() * (p - q)).sum())
    seen = []
    found = mean_kl(llama, other, text, batch_tokens=48, progress=lambda *step: seen.append(step))
    assert math.isclose(found, total / text.tokens, rel_tol=1e-4) and found > 1e-3
    assert found != pytest.approx(mean_kl(other, llama, text), rel=1e-3)
    assert seen == [(2, 5), (3, 5), (5, 5)]
    assert mean_kl(llama, llama, text) == 0.0


def test_a_divergence_that_is_no_number_is_an_error(llama, qwen2, data):
    with torch.no_grad():
        qwen2.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="KL divergence is not a number"):
        mean_kl(llama, qwen2, data)
