"""An allocation that was made before."""

import pytest
import torch

from msp_plugin.errors import RecipeError, VerificationError
from msp_plugin.records.parts import SearchRecord
from msp_plugin.search.allocate import check_model
from tests.helpers.allocating import allocate


def test_a_finished_allocation_is_taken_as_it_is(llama, data, msp_plan, tmp_path):
    path = tmp_path / "allocation.json"
    path.write_text(allocate(llama, data, msp_plan()).allocation.to_json())
    outcome = allocate(llama, None, msp_plan(sparsity=None, allocation=str(path), allocator="search"))
    assert outcome.allocation.to_json() == path.read_text() and outcome.search == SearchRecord()


def test_a_finished_allocation_brings_its_own_targets(llama, msp_plan, tmp_path):
    path = tmp_path / "allocation.json"
    made = allocate(llama, None, msp_plan(allocator="uniform", ignore=["o_proj"])).allocation
    path.write_text(made.to_json())
    assert check_model(llama, msp_plan(sparsity=None, allocation=str(path), allocator="search")) == made.table


@pytest.mark.parametrize("levels", [["default"], ["4:8", "2:8", "1:8"]])
def test_the_baseline_of_a_finished_allocation_is_within_the_bounds_that_it_was_made_in(
    llama, msp_plan, tmp_path, levels
):
    path = tmp_path / "allocation.json"
    bounds = {"protect": ["o_proj"], "bounds": {"up_proj": [0.5, 0.5]}, "levels": levels, "sparsity": "1/2"}
    made = allocate(llama, None, msp_plan(allocator="uniform", **bounds)).allocation
    path.write_text(made.to_json())
    given = msp_plan(sparsity=None, allocation=str(path), allocator="search")
    assert allocate(llama, None, given.uniform()).allocation.levels == made.levels
    if levels != ["default"]:  # only protected layers may be dense, in the baseline too
        assert made.provenance["levels"] == levels and given.uniform().bounds.dense_for_protected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("protect", ["down_proj"]), ("bounds", {"q_proj": [0, 0.5]}), ("granularity", "block"), ("levels", ["2:4"]),
        ("allocator", "owl"), ("allocator", {"name": "search", "rounds": 2}), ("ignore", ["o_proj"]),
        ("targets", ["down_proj"]), ("estimators", {"fisher": {"samples": 2}}),
    ],
)  # fmt: skip
def test_what_a_finished_allocation_has_decided_cannot_be_said_again(
    llama, msp_plan, tmp_path, option, value
):
    path = tmp_path / "allocation.json"
    path.write_text(allocate(llama, None, msp_plan(allocator="uniform")).allocation.to_json())
    given = {"sparsity": None, "allocation": str(path), "allocator": "search", option: value}
    with pytest.raises(RecipeError, match=f"^{option} would have no effect: .*allocation.json has decided"):
        msp_plan(**given)


def test_an_allocation_of_another_model_is_refused(llama, msp_plan, tmp_path):
    path = tmp_path / "allocation.json"
    path.write_text(allocate(llama, None, msp_plan(allocator="uniform")).allocation.to_json())
    llama.model.layers[1].mlp.down_proj = torch.nn.Linear(256, 64)
    with pytest.raises(VerificationError, match=r"1 of its 14 layers .*1.mlp.down_proj \[64, 128\]"):
        allocate(llama, None, msp_plan(sparsity=None, allocation=str(path), allocator="search"))
