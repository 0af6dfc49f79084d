"""The ``served`` check: what a server answers against transformers, and what its plugin reports of the kernels."""

import json
import math

import pytest

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.errors import RecipeError
from msp_plugin.models.source import load_tokenizer
from msp_plugin.verify import server as module
from msp_plugin.verify.base import Subject, run_checks
from msp_plugin.verify.served import PROMPTS, Served, greedy, scores

TOKENS = 6


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    sleep = module.time.sleep
    monkeypatch.setattr(module.time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))


@pytest.fixture(scope="module")
def truth(run_dir):
    """What a right server answers to the first three prompts."""
    tokenizer, model = load_tokenizer(run_dir), load(run_dir, "float32")
    found = {}
    for text in PROMPTS[:3]:
        prompt = tokenizer(text)["input_ids"]
        answer = greedy(model, prompt, TOKENS)
        found[",".join(map(str, prompt))] = {"tokens": list(answer.tokens), "logprobs": list(answer.logprobs)}
    assert len(found) == 3
    return found


def report(packed, **changes):
    """What the plugin says of each packed layer."""
    size = {"bytes": 9, "dense_bytes": 16, "rank": 0}
    return [
        {"layer": n, "packed": [n], "kernel": "cusparselt", "reason": "", **size, **changes} for n in packed
    ]


def rows_of(path, environment, **options):
    check = Served(prompts=3, tokens=TOKENS, patience=60, **options)
    (result,) = run_checks(Subject(Checkpoint.open(path), environment=environment), [check])
    json.dumps(result.to_dict(), allow_nan=False)
    return {row.item: row for row in result.findings}


def states(rows):
    return {item: row.state for item, row in rows.items()}


def changed(truth, prompt, **fields):
    """The truth with other tokens or log-probabilities after one prompt."""
    key = list(truth)[prompt]
    return {**truth, key: {**truth[key], **fields}}


def test_a_right_server_on_a_packed_checkpoint_passes(packed_dir, truth, make_vllm):
    layers = Checkpoint.open(packed_dir).packed
    lines = [
        *report(layers[:7]),
        *report(layers[7:], kernel="dense", reason="no sparse kernel on cpu", bytes=16),
    ]
    environment = make_vllm(truth, lines)
    rows = rows_of(packed_dir, environment)
    assert states(rows) == {
        "greedy tokens": "ok", "log-probabilities": "ok", "kernel cusparselt": "ok", "kernel dense": "ok",
    }  # fmt: skip
    assert rows["greedy tokens"].found == "18 of 18 (3 prompts x 6, float32)"
    assert rows["log-probabilities"].details["largest"] < 1e-5
    assert rows["kernel cusparselt"].found == "7 layers, 63 bytes (0.562 of dense)"
    assert rows["kernel dense"].found == "2 layers, 32 bytes (1.000 of dense); no sparse kernel on cpu"
    assert [layer["layer"] for layer in rows["kernel cusparselt"].details["layers"]] == list(layers[:7])
    command = json.loads((environment / "bin" / "argv.json").read_text())
    assert command[1] == str(packed_dir) and command[-2:] == ["--dtype", "float32"]


def test_options_reach_the_server(run_dir, truth, make_vllm):
    environment = make_vllm(truth, report(["a"]))
    rows_of(run_dir, environment, quantization="sparse24", arguments="--max-model-len 64 --title 'two words'")
    command = json.loads((environment / "bin" / "argv.json").read_text())
    assert command[-8:] == [
        "--dtype", "float32", "--quantization", "sparse24", "--max-model-len", "64", "--title", "two words",
    ]  # fmt: skip
    assert json.loads((environment / "bin" / "request.json").read_text())["body"]["max_tokens"] == TOKENS


def test_a_dense_checkpoint_on_a_plain_server_passes(run_dir, truth, make_vllm):
    rows = rows_of(run_dir, make_vllm(truth))
    assert states(rows) == {"greedy tokens": "ok", "log-probabilities": "ok", "kernels": "ok"}
    assert "vLLM's own dense ones" in rows["kernels"].found


@pytest.mark.parametrize("prompt", [0, 2])
def test_one_other_token_fails_and_prompt_and_place_are_named(prompt, run_dir, truth, make_vllm):
    tokens = list(truth[list(truth)[prompt]]["tokens"])
    tokens[4] += 1
    rows = rows_of(run_dir, make_vllm(changed(truth, prompt, tokens=tokens)))
    assert states(rows) == {"greedy tokens": "fail", "log-probabilities": "ok", "kernels": "ok"}
    assert rows["greedy tokens"].found == (
        f"17 of 18 (3 prompts x 6, float32); prompt {prompt} differs first at token 4"
    )


def test_what_follows_another_token_is_not_held_against_the_logarithms(run_dir, truth, make_vllm):
    first = truth[next(iter(truth))]
    tokens, logprobs = list(first["tokens"]), list(first["logprobs"])
    tokens[3] += 1
    logprobs[4:] = [-50.0] * 2
    rows = rows_of(run_dir, make_vllm(changed(truth, 0, tokens=tokens, logprobs=logprobs)))
    assert states(rows) == {"greedy tokens": "fail", "log-probabilities": "ok", "kernels": "ok"}
    logprobs[3] -= 1
    rows = rows_of(run_dir, make_vllm(changed(truth, 0, tokens=tokens, logprobs=logprobs)))
    assert rows["log-probabilities"].state == "fail"


@pytest.mark.parametrize(
    ("prompt", "change", "tolerance", "state"),
    [
        (0, 2e-3, 1e-3, "fail"), (1, -2e-3, 1e-3, "fail"), (1, 2e-3, 3e-3, "ok"), (0, math.nan, 1e9, "fail"),
        (1, -math.inf, 1e9, "fail"),
    ],
)  # fmt: skip
def test_one_other_logarithm_fails(prompt, change, tolerance, state, run_dir, truth, make_vllm):
    logprobs = list(truth[list(truth)[prompt]]["logprobs"])
    logprobs[3] += change
    rows = rows_of(run_dir, make_vllm(changed(truth, prompt, logprobs=logprobs)), tolerance=tolerance)
    assert states(rows) == {"greedy tokens": "ok", "log-probabilities": state, "kernels": "ok"}


def test_a_packed_checkpoint_without_a_report_fails(packed_dir, truth, make_vllm):
    row = rows_of(packed_dir, make_vllm(truth))["kernels"]
    assert row.state == "fail" and "reported no layer" in row.found and "install msp_plugin" in row.expected


def test_packing_that_was_asked_for_and_did_not_happen_fails(run_dir, truth, make_vllm):
    assert rows_of(run_dir, make_vllm(truth), quantization="sparse24")["kernels"].state == "fail"


def test_a_packed_layer_that_was_not_reported_fails_by_name(packed_dir, truth, make_vllm):
    layers = Checkpoint.open(packed_dir).packed
    row = rows_of(packed_dir, make_vllm(truth, report(layers[1:])))["kernels"]
    assert row.state == "fail" and row.found == f"1 packed layers were not reported, e.g. {layers[0]}"


def test_a_fused_layer_stands_for_all_its_parts(packed_dir, truth, make_vllm):
    layers = Checkpoint.open(packed_dir).packed
    fused = [{**report(["model.layers.0.self_attn.qkv_proj"])[0], "packed": list(layers)}]
    assert states(rows_of(packed_dir, make_vllm(truth, fused))) == {
        "greedy tokens": "ok", "log-probabilities": "ok", "kernel cusparselt": "ok",
    }  # fmt: skip


def test_a_server_that_dies_is_a_failed_row_with_its_last_lines(run_dir, make_vllm):
    rows = rows_of(run_dir, make_vllm(), arguments="--mode dies")
    assert states(rows) == {"served": "fail"} and "exit status 3" in rows["served"].found
    assert rows["served"].found.endswith("  | the reason")


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": 0},
        {"prompts": 11},
        {"tokens": 0},
        {"port": -1},
        {"port": 65536},
        {"patience": 0},
        {"tolerance": -1},
        {"arguments": "--title 'open"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(RecipeError, match="served: "):
        Served(**options)


def test_all_prompts_can_be_asked():
    assert Served(prompts=len(PROMPTS)).prompts == 10 == len(set(PROMPTS))


@pytest.fixture(scope="module")
def truth16(run_dir, truth):
    """What a right server answers in bfloat16: the tokens of float32, with what bfloat16 thinks of them."""
    model = load(run_dir, "bfloat16")
    return {
        key: {"tokens": answer["tokens"], "logprobs": list(scores(model, list(map(int, key.split(","))), answer["tokens"]).logprobs)}
        for key, answer in truth.items()
    }  # fmt: skip


def test_with_16_bits_the_servers_own_tokens_are_judged(run_dir, truth16, make_vllm):
    rows = rows_of(run_dir, make_vllm(truth16), dtype="bfloat16", tolerance=5.0)
    assert states(rows) == {"greedy tokens": "ok", "log-probabilities": "ok", "kernels": "ok"}
    assert rows["log-probabilities"].details["largest"] == 0
    assert "of 18 are transformers' most likely one" in rows["greedy tokens"].found


def test_with_16_bits_a_token_far_behind_the_best_fails(run_dir, truth16, make_vllm):
    model = load(run_dir, "bfloat16")
    key = next(iter(truth16))
    prompt, tokens = list(map(int, key.split(","))), list(truth16[key]["tokens"])
    tokens[-1] = (tokens[-1] + 1) % model.config.vocab_size
    judged = scores(model, prompt, tokens)
    wrong = changed(truth16, 0, tokens=tokens, logprobs=list(judged.logprobs))
    rows = rows_of(run_dir, make_vllm(wrong), dtype="bfloat16", tolerance=judged.behind[-1] * 0.9)
    assert rows["greedy tokens"].state == "fail" and rows["log-probabilities"].state == "ok"
    assert rows["greedy tokens"].details["behind"] == pytest.approx(judged.behind[-1])


def test_scores_are_those_of_one_token_after_another(run_dir):
    model = load(run_dir, "float32")
    answer = greedy(model, [5, 6, 7], 4)
    judged = scores(model, [5, 6, 7], answer.tokens)
    assert judged.logprobs == pytest.approx(answer.logprobs, abs=1e-5) and max(judged.behind) == 0


def test_a_kernel_that_failed_fails_the_check(packed_dir, truth, make_vllm):
    lines = report(Checkpoint.open(packed_dir).packed)
    lines[3] |= {"kernel": "dense", "reason": "cusparselt was wrong by 0.5", "failed": True}
    rows = rows_of(packed_dir, make_vllm(truth, lines))
    assert rows["kernel dense"].state == "fail" and rows["kernel cusparselt"].state == "ok"


def test_processes_of_a_group_report_one_layer_together(packed_dir, truth, make_vllm):
    layers = Checkpoint.open(packed_dir).packed
    rows = rows_of(packed_dir, make_vllm(truth, [*report(layers), *report(layers, rank=1)]))
    assert rows["kernel cusparselt"].found.startswith(f"{len(layers)} layers, {2 * 9 * len(layers)} bytes")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(RecipeError, match="dtype = 'bfloat61'"):
        Served(dtype="bfloat61")
