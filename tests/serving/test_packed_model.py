"""``load(packed=True)``: a transformers model that generates from packed weights, in both formats."""

import copy
import gc
import json
import logging
import subprocess
import sys
import weakref

import pytest
import torch

import msp_plugin
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.errors import FormatError, ModelError, ServingError
from msp_plugin.serving.cpu import build
from msp_plugin.serving.cpu.kernel import FORCE, KERNELS, choose
from msp_plugin.serving.cpu.linear import PackedLinear

reason = build.load_operator()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no kernels here: {reason}")


@pytest.fixture(
    scope="module",
    params=[Sparse24(), Bitmask(), Bitmask(values="int8")],
    ids=["sparse24", "bitmask", "int8"],
)
def packed_path(request, run_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model"
    export_checkpoint(run_dir, request.param, path)
    return path


def packed_linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def generated(model, tokens=12):
    return model.generate(torch.tensor([[3, 14, 15, 92]]), max_new_tokens=tokens, do_sample=False)


def test_it_gives_the_dense_models_greedy_tokens_in_float32(packed_path):
    model, dense = (
        msp_plugin.load(packed_path, "float32", packed=True),
        msp_plugin.load(packed_path, "float32"),
    )
    assert type(model) is type(dense) and not model.training and packed_linears(model)
    assert torch.equal(generated(model), generated(dense))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=2e-5)


def test_in_the_checkpoints_own_dtype_its_log_probabilities_are_within_rounding(packed_path):
    model, dense = msp_plugin.load(packed_path, packed=True), msp_plugin.load(packed_path)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        ours, theirs = (m(ids).logits.float().log_softmax(-1) for m in (model, dense))
    lossy = msp_plugin.Checkpoint.open(packed_path).format.lossy  # then the dense weights are rounded too
    assert model.dtype == torch.bfloat16 and float((ours - theirs).abs().max()) < (0.2 if lossy else 0.1)


def bitmasks():
    gc.collect()
    return [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype == torch.uint8]


def test_what_was_loaded_is_not_kept_beside_what_the_kernels_read(packed_path):
    before = {id(t) for t in bitmasks()}
    model = msp_plugin.load(packed_path, packed=True)
    held = {linear.bitmask.data_ptr() for linear in packed_linears(model).values()}
    assert held and not [t for t in bitmasks() if id(t) not in before and t.data_ptr() not in held]


def test_packed_layers_are_those_of_the_checkpoint_and_hold_its_bytes(packed_path):
    checkpoint = msp_plugin.Checkpoint.open(packed_path)
    model = msp_plugin.load(packed_path, packed=True)
    linears = packed_linears(model)
    assert set(linears) == set(checkpoint.packed)
    state = model.state_dict()
    for name, module in linears.items():
        assert module.kernel == choose(torch.bfloat16).kernel
        for suffix in checkpoint.format.suffixes:
            stored = checkpoint.tensors.read(f"{name}.{suffix}")
            assert torch.equal(state[f"{name}.{suffix}"], stored)
        assert torch.equal(module.weight, checkpoint.weight(name))
    held = sum(t.nbytes for t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.values())
    stored = sum(info.bytes for info in checkpoint.tensors.values())
    starts = sum(8 * module.out_features for module in linears.values())
    assert held <= stored + starts + 1024  # and rotary frequencies


def test_it_is_not_trained(packed_path):
    model = msp_plugin.load(packed_path, packed=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ServingError, match="packed weights are not trained") as error:
        copy.deepcopy(model).train()
    with pytest.raises(ServingError, match="not trained"):
        model.train()
    assert "without packed=True" in error.value.hint
    assert not any(module.training for module in model.modules()) and model.train(False) is model
    x = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(ServingError, match="not trained"):
        next(iter(packed_linears(model).values()))(x)


def test_it_is_not_saved_as_files_that_nobody_could_read(packed_path, tmp_path):
    model = msp_plugin.load(packed_path, packed=True)
    with pytest.raises(ServingError, match="packed layers is not saved") as error:
        model.save_pretrained(tmp_path / "saved")
    assert "--to dense" in error.value.hint and not (tmp_path / "saved").exists()


def test_a_row_whose_scale_the_dtype_cannot_hold_keeps_its_weights(make_run, llama, tmp_path):
    layer = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        llama.get_parameter(f"{layer}.weight")[3].mul_(2e-5)  # its scale is far below float16's least number
    run = make_run(tmp_path / "run", llama)
    export_checkpoint(run, Bitmask(values="int8"), tmp_path / "packed")
    wide = msp_plugin.load(tmp_path / "packed", "float32").get_parameter(f"{layer}.weight")
    for packed in (False, True):
        model = msp_plugin.load(tmp_path / "packed", "float16", packed=packed)
        assert torch.equal(model.get_submodule(layer).weight, wide.half())
    assert wide[3].any() and isinstance(model.get_submodule(layer), PackedLinear)
    assert torch.equal(model.half().float().get_submodule(layer).weight, wide)


def test_a_copy_of_the_model_gives_the_same(packed_path):
    model = msp_plugin.load(packed_path, packed=True)
    assert torch.equal(generated(copy.deepcopy(model)), generated(model))


def test_where_there_is_no_kernel_the_model_is_dense_and_one_line_says_why(packed_path, monkeypatch, caplog):
    monkeypatch.setenv(FORCE, "dense")
    with caplog.at_level(logging.WARNING, logger="msp_plugin.serving.load"):
        model = msp_plugin.load(packed_path, packed=True)
    assert not packed_linears(model)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "msp_plugin.serving.load"]
    assert f"{len(msp_plugin.Checkpoint.open(packed_path).packed)} on dense (MSP_CPU_KERNEL says so)" in line
    dense = msp_plugin.load(packed_path)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in dense.state_dict().items()
    }
    assert torch.equal(generated(model), generated(dense))


def test_where_there_is_no_kernel_one_layer_at_a_time_is_held_in_both_forms(packed_path, monkeypatch):
    monkeypatch.setenv(FORCE, "dense")
    made, alive, prepare = [], [], PackedLinear.prepare

    def prepared(module):
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(module))
        return prepare(module)

    monkeypatch.setattr(PackedLinear, "prepare", prepared)
    gc.disable()
    try:
        msp_plugin.load(packed_path, packed=True)
    finally:
        gc.enable()
    assert len(alive) > 5 and max(alive) <= 1


def test_a_tied_model_with_biases_keeps_both(qwen2, make_run, tmp_path):
    run = make_run(tmp_path / "run", qwen2)
    export_checkpoint(run, Bitmask(), tmp_path / "packed")
    model, dense = (
        msp_plugin.load(tmp_path / "packed", "float32", packed=True),
        msp_plugin.load(run, "float32"),
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(generated(model), generated(dense))


def test_a_dense_checkpoint_cannot_be_kept_packed(run_dir):
    with pytest.raises(ModelError, match="is not packed") as error:
        msp_plugin.load(run_dir, packed=True)
    assert "--to bitmask" in error.value.hint


def test_a_packed_model_does_not_stay_on_disk(packed_path):
    with pytest.raises(ModelError, match="only dense checkpoints can stay on disk"):
        msp_plugin.load(packed_path, packed=True, offload=True)


def test_a_damaged_mask_is_refused(packed_path, copied, rewrite):
    path = copied(packed_path)
    layer = msp_plugin.Checkpoint.open(path).packed[0]
    rewrite(path, {f"{layer}.bitmask": lambda mask: mask ^ 1})
    (path / "export.json").unlink()
    with pytest.raises(FormatError, match=layer):
        msp_plugin.load(path, packed=True)


@pytest.mark.slow
def test_a_model_that_was_sent_to_another_process_runs_there(packed_path, tmp_path):
    model = msp_plugin.load(packed_path, "float32", packed=True)
    code = (
        "import sys, torch, msp_plugin; model = torch.load(sys.argv[1], weights_only=False);"
        "print(model.generate(torch.tensor([[3, 14, 15, 92]]), max_new_tokens=12, do_sample=False).tolist())"
    )
    lacking = [kernel for kernel in KERNELS if not torch.ops.msp_plugin.cpu_supports(kernel)]
    for kernel in (None, *lacking[:1]):
        for module in packed_linears(model).values() if kernel else ():
            module.kernel = kernel
        torch.save(model, tmp_path / "model.pt")
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True
        )
        assert (
            json.loads(done.stdout.splitlines()[-1])
            == generated(msp_plugin.load(packed_path, "float32")).tolist()
        )


def test_a_model_in_float64_is_refused(packed_path):
    model = msp_plugin.load(packed_path, "float32", packed=True).double()
    with torch.no_grad(), pytest.raises(ServingError, match=r"not torch.float64"):
        model(torch.arange(8)[None])


def test_under_autocast_it_is_as_a_dense_model_is(packed_path):
    model, dense = (msp_plugin.load(packed_path, "float32", packed=packed) for packed in (True, False))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        loaded_inside = msp_plugin.load(packed_path, "float32", packed=True)
        ours, theirs, inside = (m(ids).logits.float() for m in (model, dense, loaded_inside))
        x = torch.ones(1, 64)
        assert next(iter(packed_linears(model).values()))(x).dtype == torch.bfloat16
    assert torch.equal(ours, inside)
    assert len(packed_linears(loaded_inside)) == len(packed_linears(model)) > 0
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_no_part_of_it_is_saved(packed_path, tmp_path):
    model = msp_plugin.load(packed_path, packed=True)
    with pytest.raises(ServingError, match="packed layers is not saved"):
        model.model.save_pretrained(tmp_path / "saved")


def test_packed_matrices_that_are_no_linears_become_dense(tmp_path, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32))
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.view(-1, 4)[:, 1:] = 0
    model.save_pretrained(tmp_path / "model")
    export_checkpoint(tmp_path / "model", Bitmask(), tmp_path / "packed")
    loaded = msp_plugin.load(tmp_path / "packed", packed=True)
    assert "2 packed layers are no linears and become dense" in caplog.text
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, msp_plugin.load(tmp_path / "packed")(ids).logits)
