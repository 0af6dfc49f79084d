import types
from contextlib import nullcontext

import pytest
import torch
from safetensors import safe_open

from msp_plugin.database.build import build_database, check_space
from msp_plugin.database.statistics import collect
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import MSPError, NumericsError, OutputError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.base import LayerwisePruner
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.runtime import disk as writing

MENU = parse_menu(["dense", "6:8", "4:8", "1:8"])
METHODS = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}


@pytest.fixture(
    params=["wanda", "sparsegpt", *(pytest.param(n, marks=pytest.mark.slow) for n in ("magnitude", "ria"))]
)
def pruner(request, sample_plugin):
    return sample_plugin("ria").RIA() if request.param == "ria" else METHODS[request.param]


def make(root, pruner, menu=MENU):
    return LevelDatabase(root, {"method": pruner.name}, menu)


def inputs_of(model, name, data):
    """All inputs [tokens, in] of a layer in the dense model."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for sample in data.samples:
            model(sample[None])
    handle.remove()
    return torch.cat(seen, dim=1)


def files(database):
    return {path.name: path.read_bytes() for path in database.path.iterdir()}


def contents(database):
    """Everything in the files but the order of their headers, which safetensors leaves open."""
    found = {}
    for path in database.path.iterdir():
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
            found[path.name] = (file.metadata(), tensors)
    return found


def test_the_database_holds_what_the_method_gives_for_each_layers_own_inputs(tmp_path, model, data, pruner):
    table = prunable_layers(model)
    database = make(tmp_path, pruner)
    assert build_database(database, model, table, pruner, data, batch_tokens=1) == len(table.layers)
    levels = [level for level in MENU if not level.is_dense]
    for layer in table.layers:
        module = model.get_submodule(layer.name)
        statistic = pruner.new_statistic(module)
        if pruner.needs_statistics:
            for x in inputs_of(model, layer.name, data).split(24, dim=1):
                statistic = pruner.observe(module, x, statistic)
        for level, pruned in zip(levels, pruner.prune_levels(module, statistic, levels, "x"), strict=True):
            assert torch.equal(database.weight(layer.name, level.name), pruned)
            assert int((pruned == 0).sum()) == layer.weights - level.kept(layer)


def test_errors_are_the_weights_and_the_outputs_change(tmp_path, llama, data):
    table, pruner = prunable_layers(llama), SparseGPT()
    database = make(tmp_path, pruner)
    build_database(database, llama, table, pruner, data)
    weight_error, output_error = database.errors(table)
    assert weight_error.shape == output_error.shape == (len(table), len(MENU))
    for u, unit in enumerate(table):
        for k, level in enumerate(MENU):
            weight = output = 0.0
            for layer in unit.layers:
                if level.is_dense:
                    continue
                delta = (
                    database.weight(layer.name, level.name).double()
                    - llama.get_submodule(layer.name).weight.detach().double()
                )
                x = inputs_of(llama, layer.name, data)[0].double()
                weight += float(delta.square().sum())
                by_row = (x @ delta.T).square().mean(dim=0)
                found = database.row_errors(layer.name, level.name)
                assert found.dtype == torch.float32
                torch.testing.assert_close(
                    found.double(), by_row, rtol=1e-3, atol=1e-3 * float(by_row.mean())
                )
                output += float(by_row.sum())
            assert weight_error[u, k] == pytest.approx(weight, rel=1e-5)
            assert output_error[u, k] == pytest.approx(output, rel=1e-3)


def test_a_second_build_writes_nothing(tmp_path, llama, data, pruner):
    table = prunable_layers(llama)
    build_database(make(tmp_path, pruner), llama, table, pruner, data)
    before = files(make(tmp_path, pruner))
    seen = []
    assert (
        build_database(
            make(tmp_path, pruner), llama, table, pruner, data, progress=lambda *at: seen.append(at)
        )
        == 0
    )
    assert files(make(tmp_path, pruner)) == before and not seen


def test_a_build_elsewhere_gives_the_same_weights_and_errors(tmp_path, llama, data, pruner):
    table = prunable_layers(llama)
    for root in ("a", "b"):
        build_database(make(tmp_path / root, pruner), llama, table, pruner, data)
    assert contents(make(tmp_path / "a", pruner)) == contents(make(tmp_path / "b", pruner))


def test_only_missing_and_truncated_layers_are_built_again(tmp_path, llama, data):
    table, pruner = prunable_layers(llama), SparseGPT()
    database = make(tmp_path, pruner)
    build_database(database, llama, table, pruner, data)
    before, untouched = contents(database), files(database)
    gone, cut = (
        database.file("model.layers.0.self_attn.o_proj"),
        database.file("model.layers.1.mlp.down_proj"),
    )
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:5000])
    seen = []
    again = make(tmp_path, pruner)
    assert build_database(again, llama, table, pruner, data, progress=lambda *at: seen.append(at)) == 2
    assert contents(again) == before and sorted({*seen}) == [(0, 2), (1, 2), (2, 2)]
    assert sum(files(again)[name] == content for name, content in untouched.items()) >= len(table.layers) - 2


def test_a_database_that_is_built_anew_takes_the_room_of_the_old_one(tmp_path, llama, data, monkeypatch):
    table = prunable_layers(llama)
    built = make(tmp_path, Wanda())
    build_database(built, llama, table, Wanda(), data)
    sizes = [built.file(layer.name).stat().st_size for layer in table.layers]
    again = make(tmp_path, Wanda())
    again.renew()
    for room, enough in ((max(sizes) + 4096, True), (max(sizes) // 2, False)):
        monkeypatch.setattr(
            writing.shutil, "disk_usage", lambda path, room=room: types.SimpleNamespace(free=room)
        )
        with nullcontext() if enough else pytest.raises(OutputError, match="the level database needs"):
            check_space(again, llama, table)


def test_many_groups_give_the_weights_of_one(tmp_path, model, data, pruner):
    table = prunable_layers(model)
    build_database(make(tmp_path / "one", pruner), model, table, pruner, data)
    for limit in (1, 3 * 4 * 64 * 64):
        build_database(
            make(tmp_path / str(limit), pruner), model, table, pruner, data, statistics_bytes=limit
        )
        assert contents(make(tmp_path / str(limit), pruner)) == contents(make(tmp_path / "one", pruner))


def test_layers_that_share_an_input_share_a_statistic(llama, data):
    table = prunable_layers(llama)
    found = collect(llama, list(table), Wanda(), data, 4096)
    assert set(found) == set(table.names)
    for unit in table:
        for layer in unit.layers:
            x = inputs_of(llama, layer.name, data)[0].double()
            statistic = found[unit.name]
            assert (statistic.samples, statistic.tokens) == (6, 144)
            torch.testing.assert_close(
                statistic.mean.double() * 6 / 144, x.square().mean(0), rtol=1e-4, atol=1e-6
            )


def test_a_forward_pass_ends_after_the_last_layer_that_is_observed(llama, data):
    table = prunable_layers(llama, ["re:model.layers.0"])
    ran = []
    llama.model.layers[1].register_forward_hook(lambda *args: ran.append(1))
    collect(llama, list(table), Wanda(), data, 4096)
    assert not ran


def test_the_model_is_left_bit_for_bit_without_hooks(tmp_path, model, data, pruner, bits, count_hooks):
    before, hooks = bits(model), count_hooks(model)
    build_database(make(tmp_path, pruner), model, prunable_layers(model), pruner, data, statistics_bytes=1)
    assert bits(model) == before and count_hooks(model) == hooks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_names_the_layer_and_leaves_the_model(
    tmp_path, llama, data, bits, count_hooks, value
):
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight[0, 0] = value
    before, hooks = bits(llama), count_hooks(llama)
    with pytest.raises(NumericsError, match="output of model.layers.0 is not finite") as error:
        build_database(make(tmp_path, Wanda()), llama, prunable_layers(llama), Wanda(), data)
    assert "bfloat16" in error.value.hint
    assert bits(llama) == before and count_hooks(llama) == hooks
    assert not make(tmp_path, Wanda()).path.exists()


def test_a_method_that_returns_what_is_not_finite_is_named(tmp_path, llama, data):
    class Odd(LayerwisePruner):
        name = "odd"

        def score(self, weight, input_norm):
            return weight.abs()

        def prune_levels(self, module, statistic, levels, layer):
            for level in levels:
                yield module.weight.detach() / (0.0 if level.n == 4 else 1.0)

    with pytest.raises(
        NumericsError, match="'odd' returned .* for model.layers.0.self_attn.q_proj at 4:8"
    ) as error:
        build_database(make(tmp_path, Odd()), llama, prunable_layers(llama), Odd(), data)
    assert "dampening" in error.value.hint
    assert not make(tmp_path, Odd()).path.exists()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_layer_that_no_token_reaches_is_named(tmp_path, llama, data, method):
    llama.model.layers[1].mlp.spare = torch.nn.Linear(64, 64)
    with pytest.raises(MSPError, match=r"model.layers.1.mlp.spare"):
        build_database(make(tmp_path, METHODS[method]), llama, prunable_layers(llama), METHODS[method], data)


def test_bfloat16_models_keep_their_dtype(tmp_path, llama, data, pruner):
    llama.bfloat16()
    table = prunable_layers(llama, ["re:model.layers.0"])
    database = make(tmp_path, pruner)
    build_database(database, llama, table, pruner, data)
    for layer in table.layers:
        assert {database.weight(layer.name, level.name).dtype for level in MENU[1:]} == {torch.bfloat16}


def test_a_line_may_be_printed_after_each_forward_pass(tmp_path, llama, make_samples):
    """A layer's pruning may take minutes: the last report is given again, so that a log is not silent until the next."""
    seen = []
    build_database(make(tmp_path, Wanda()), llama, prunable_layers(llama), Wanda(), make_samples(4, 8),
                   progress=lambda *at: seen.append(at), batch_tokens=8)  # fmt: skip
    done = [at[0] for at in seen]
    assert seen[0] == (0, 14) and done == sorted(done) and done.count(0) >= 4
