import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msp_plugin.database.bitmask import pack_bitmask
from msp_plugin.database.store import OPEN_FILES, LayerErrors, LevelDatabase
from msp_plugin.errors import VerificationError
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable

MENU = parse_menu(["dense", "2:4", "1:4"])
LAYER = Layer("l.0.up_proj", 4, 8)


def database(root, identity=None, menu=MENU):
    return LevelDatabase(root, identity or {"model": "a", "options": {"x": 1}}, menu)


def weights(seed=0, names=("2:4", "1:4"), shape=(4, 8)):
    torch.manual_seed(seed)
    return {name: torch.randn(shape).masked_fill(torch.rand(shape) < 0.5, 0.0) for name in names}


def tensors(names=("2:4", "1:4"), seed=0):
    """What a file holds of the weights."""
    packed = {name: pack_bitmask(weight) for name, weight in weights(seed, names).items()}
    return {
        f"{n}.{part}": t
        for n, both in packed.items()
        for part, t in zip(("values", "bitmask"), both, strict=True)
    }


def about(store, held, **changes):
    """The metadata of a file that holds the tensors."""
    found = {
        "key": store.key, "layer": LAYER.name, "shape": [4, 8],
        "errors": {name: [0.0, 0.0] for name in ("dense", "2:4", "1:4")},
        "crc32": {name: zlib.crc32(t.view(torch.uint8).numpy()) for name, t in held.items()},
        "dtypes": {name: str(t.dtype) for name, t in held.items()},
    }  # fmt: skip
    text = json.dumps({**found, **changes})
    return {"about": f"{zlib.crc32(text.encode()):08x} {text}"}


ERRORS = {"dense": LayerErrors(0.0, 0.0), "2:4": LayerErrors(0.1, 1 / 3), "1:4": LayerErrors(2.0, 1e-300)}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux' list of mapped files")
def test_few_of_the_files_are_mapped_at_a_time(tmp_path):
    layers = [Layer(f"l.{i}.up_proj", 4, 8) for i in range(OPEN_FILES + 20)]
    store = database(tmp_path)
    for layer in layers:
        store.write(layer, weights(), ERRORS)
    held = {(layer.name, name): store.weight(layer.name, name) for layer in layers for name in ("2:4", "1:4")}
    mapped = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    }
    assert len(mapped) <= OPEN_FILES and len(held) == 2 * len(layers)
    for (layer, name), weight in held.items():  # and none of the weights is a view of a file that was closed
        assert torch.equal(store.weight(layer, name), weight)


def test_a_weight_comes_back_bit_for_bit(tmp_path):
    held = {**weights(), "1:4": torch.tensor([[float("nan"), -1.0] * 4] * 4)}
    database(tmp_path).write(LAYER, held, ERRORS)
    fresh = database(tmp_path)
    assert fresh.has(LAYER)
    for name, weight in held.items():
        found = fresh.weight(LAYER.name, name)
        assert torch.equal(found.view(torch.int32), weight.view(torch.int32)) and found.dtype == weight.dtype


def test_bfloat16_and_strided_weights_come_back_too(tmp_path):
    held = {name: w.T.contiguous().T.bfloat16() for name, w in weights().items()}
    database(tmp_path).write(LAYER, held, ERRORS)
    for name, weight in held.items():
        assert torch.equal(database(tmp_path).weight(LAYER.name, name), weight)


def test_errors_are_exact_and_summed_over_the_layers_of_a_unit(tmp_path):
    store, other = database(tmp_path), Layer("l.0.gate_proj", 4, 8)
    store.write(LAYER, weights(), ERRORS)
    store.write(other, weights(1), {name: LayerErrors(1.0, 2.0) for name in ERRORS})
    table = UnitTable((Unit("both", 0, (LAYER, other)), Unit("one", 0, (LAYER,))))
    weight_error, output_error = store.errors(table)
    assert weight_error.tolist() == [[1.0, 1.1, 3.0], [0.0, 0.1, 2.0]]
    assert output_error.tolist() == [[2.0, 2 + 1 / 3, 2.0], [0.0, 1 / 3, 1e-300]]


def test_the_key_names_everything_the_weights_depend_on(tmp_path):
    keys = [
        database(tmp_path, {"model": "a", "options": {"x": 1}}).key,
        database(tmp_path, {"model": "b", "options": {"x": 1}}).key,
        database(tmp_path, {"model": "a", "options": {"x": 2}}).key,
        database(tmp_path, {"model": "a", "options": {"x": 1}, "more": None}).key,
        database(tmp_path, menu=MENU[:2]).key,
        database(tmp_path, menu=parse_menu(["dense", "4:8", "1:4"])).key,
    ]
    assert len(set(keys)) == len(keys)
    assert database(tmp_path, {"options": {"x": 1}, "model": "a"}).key == keys[0]
    assert database(tmp_path).key == keys[0] and database(tmp_path).path.name == keys[0][:24]


def test_what_is_not_there_is_not_had(tmp_path):
    assert not database(tmp_path).has(LAYER)
    database(tmp_path).write(LAYER, weights(), ERRORS)
    assert not database(tmp_path).has(Layer("l.0.gate_proj", 4, 8))
    assert not database(tmp_path).has(Layer(LAYER.name, 8, 8))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_not_had(tmp_path, share):
    database(tmp_path).write(LAYER, weights(), ERRORS)
    path = database(tmp_path).file(LAYER.name)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert not database(tmp_path).has(LAYER)


@pytest.mark.parametrize("change", [
    {"key": "other"}, {"layer": "l.1.up_proj"}, {"shape": [8, 4]}, {"crc32": {}}, {"errors": {}},
    {"crc32": None}, {"errors": 3}, {"dtypes": {}},
])  # fmt: skip
def test_another_databases_file_is_not_had_and_is_named(tmp_path, change, caplog):
    store = database(tmp_path)
    store.path.mkdir(parents=True)
    held = tensors()
    save_file(held, store.file(LAYER.name), metadata=about(store, held))
    assert store.has(LAYER) and not caplog.records
    save_file(held, store.file(LAYER.name), metadata=about(store, held, **change))
    again = database(tmp_path)
    assert not again.has(LAYER) and not again.has(LAYER)
    (said,) = caplog.messages  # once, however often it is asked
    assert f"{store.file(LAYER.name)} cannot be used, it is built anew" in said


def test_a_file_without_a_level_or_metadata_is_not_had(tmp_path):
    store = database(tmp_path)
    store.path.mkdir(parents=True)
    few, all_levels = tensors(("2:4",)), tensors()
    for held, metadata, there in (
        (few, about(store, few), False),
        (few, about(store, all_levels), False),
        (all_levels, None, False),
        (all_levels, about(store, all_levels), True),
    ):
        save_file(held, store.file(LAYER.name), metadata=metadata)
        assert database(tmp_path).has(LAYER) == there


def test_one_wrong_bit_anywhere_in_the_weights_is_found_and_its_tensor_named(tmp_path, caplog):
    store = database(tmp_path)
    store.write(LAYER, weights(), ERRORS)
    path = store.file(LAYER.name)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content)):
        caplog.clear()
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert not database(tmp_path).has(LAYER)
        assert (
            ".values: the checksum differs" in caplog.text or ".bitmask: the checksum differs" in caplog.text
        )
    path.write_bytes(content)
    assert database(tmp_path).has(LAYER)


def test_one_wrong_character_of_what_a_file_says_of_its_weights_is_found(tmp_path):
    store = database(tmp_path)
    store.write(LAYER, weights(), ERRORS)
    path = store.file(LAYER.name)
    content = path.read_bytes()
    for old, new in ((b"0.1", b"0.9"), (b'"F32"', b'"I32"')):
        assert old in content
        path.write_bytes(content.replace(old, new, 1))
        assert not database(tmp_path).has(LAYER), old


def test_what_a_killed_writer_left_is_removed(tmp_path):
    store = database(tmp_path)
    store.write(LAYER, weights(), ERRORS)
    left, journal = store.path / f".{LAYER.name}.safetensors.0f.partial", store.path / ".a.jsonl.0f.partial"
    left.write_bytes(b"half")
    journal.write_bytes(b"of another process")
    store.tidy()
    assert not left.exists() and journal.exists()


def test_a_database_that_is_renewed_is_written_anew_and_stays_readable_for_others_meanwhile(tmp_path):
    store, other = database(tmp_path), database(tmp_path)
    store.write(LAYER, weights(), ERRORS)
    again = database(tmp_path)
    again.renew()
    assert not again.has(LAYER) and other.has(LAYER) and other.weight(LAYER.name, "2:4").shape
    again.write(LAYER, weights(), ERRORS)
    assert again.has(LAYER) and database(tmp_path).has(LAYER)


def test_errors_of_a_file_that_is_gone_are_named_with_the_way_out(tmp_path):
    from msp_plugin.plan.units import Unit, UnitTable

    table = UnitTable((Unit(LAYER.name, 0, (LAYER,)),))
    with pytest.raises(VerificationError, match=f"the errors of {LAYER.name}") as error:
        database(tmp_path).errors(table)
    assert "built anew" in error.value.hint


def test_a_bitmask_that_does_not_fit_its_values_is_named_with_the_way_out(tmp_path):
    store = database(tmp_path)
    store.path.mkdir(parents=True)
    held = {**tensors(), "2:4.values": torch.zeros(3)}
    save_file(held, store.file(LAYER.name), metadata=about(store, held))
    with pytest.raises(VerificationError, match="there are 3 values") as error:
        store.weight(LAYER.name, "2:4")
    assert "remove that directory" in error.value.hint


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    store = database(tmp_path)
    store.path.mkdir(parents=True)
    save_file(tensors(seed=1), store.file(LAYER.name), metadata={"key": "another database's"})
    assert not store.has(LAYER)
    store.write(LAYER, weights(seed=2), ERRORS)
    assert store.has(LAYER)
    assert torch.equal(store.weight(LAYER.name, "2:4"), weights(seed=2)["2:4"])


@pytest.mark.parametrize("layer, level", [("l.9.up_proj", "2:4"), (LAYER.name, "3:4")])
def test_a_weight_that_is_not_held_is_named_with_the_way_out(tmp_path, layer, level):
    store = database(tmp_path)
    store.write(LAYER, weights(), ERRORS)
    with pytest.raises(VerificationError, match=f"cannot give {layer} at {level}") as error:
        store.weight(layer, level)
    assert str(store.path) in error.value.message and "remove that directory" in error.value.hint


def test_a_failed_write_leaves_nothing(tmp_path):
    store = database(tmp_path)
    with pytest.raises(TypeError):
        store.write(LAYER, {"2:4": torch.zeros(4, 8)}, {"2:4": LayerErrors(0.0, object())})
    with pytest.raises((ValueError, AttributeError)):
        store.write(LAYER, {"2:4": "no tensor"}, ERRORS)
    assert not store.path.exists() or not list(store.path.iterdir())


def test_row_errors_come_back_and_are_checked(tmp_path):
    rows, table = (
        {name: torch.rand(4, dtype=torch.float64) for name in ("2:4", "1:4")},
        UnitTable((Unit("one", 0, (LAYER,)),)),
    )
    database(tmp_path).write(LAYER, weights(), ERRORS, rows)
    fresh = database(tmp_path)
    assert fresh.has(LAYER) and fresh.has_row_errors(table)
    assert torch.equal(fresh.row_errors(LAYER.name, "1:4"), rows["1:4"].float())
    database(tmp_path).write(LAYER, weights(), ERRORS, {"2:4": rows["2:4"]})
    assert not database(tmp_path).has(LAYER)  # a level has none


def test_a_method_without_row_errors_leaves_none(tmp_path):
    database(tmp_path).write(LAYER, weights(), ERRORS)
    fresh = database(tmp_path)
    assert fresh.has(LAYER) and not fresh.has_row_errors(UnitTable((Unit("one", 0, (LAYER,)),)))
    with pytest.raises(VerificationError, match="the row errors of"):
        fresh.row_errors(LAYER.name, "1:4")
