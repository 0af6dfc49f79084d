"""The errors of units at levels: Fisher-weighted, K-FAC, and the KL of one pruned unit."""

from dataclasses import replace

import numpy as np
import pytest

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.passes.losses import mean_kl
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.search import measurements
from msp_plugin.sensitivity.fisher import FisherTrace
from msp_plugin.sensitivity.fisher_error import diagonal_groups, fisher_errors
from msp_plugin.sensitivity.kfac_error import kfac_errors
from tests.helpers.losses import MENU, pruned_copy
from tests.helpers.measuring import Asking


def test_every_pass_for_the_fisher_weighted_error_is_counted(make_measurements, monkeypatch):
    held = make_measurements()
    once = held.sensitivity_tokens(Asking(sensitivities=()))
    monkeypatch.setattr(
        measurements, "diagonal_groups", lambda model, layers: diagonal_groups(model, layers, 20_000)
    )
    groups = len(measurements.diagonal_groups(held.model, [layer.name for layer in held.table.layers]))
    assert groups > 3 and held.sensitivity_tokens(Asking(sensitivities=())) == groups * once


def test_the_kfac_error_is_the_fisher_weighted_one_where_a_method_gives_no_rows(make_measurements):
    held, allocator = make_measurements(pruner=Magnitude()), Asking(errors=("kfac",), sensitivities=())
    assert np.array_equal(held.error("kfac"), held.error("fisher"))
    assert held.sensitivity_tokens(allocator) == held.sensitivity_tokens(
        replace(allocator, errors=("fisher",))
    )


def test_the_kfac_error_costs_one_backward_pass_over_the_samples(make_measurements):
    held = make_measurements()
    allocator = Asking(errors=("kfac",), sensitivities=())
    assert allocator.estimators == ("fisher",)
    assert held.sensitivity_tokens(allocator) == 3 * held.text.calibration.tokens


def test_a_second_object_reads_the_kfac_error_from_disk(make_measurements, monkeypatch):
    first = make_measurements().error("kfac")
    monkeypatch.delattr("msp_plugin.sensitivity.kfac_error.backward_passes")
    assert np.array_equal(make_measurements().error("kfac"), first)


def test_a_fisher_weighted_error_that_is_not_finite_is_named(make_measurements, monkeypatch):
    def errors(*args, **kwargs):
        found = fisher_errors(*args, **kwargs)
        return {**found, "model.layers.1.mlp.down_proj": {"2:4": float("nan"), "1:4": 1.0}}

    monkeypatch.setattr(measurements, "fisher_errors", errors)
    with pytest.raises(
        NumericsError, match=r"not finite for 1 layers, e\.g\. model\.layers\.1\.mlp\.down_proj"
    ):
        make_measurements().error("fisher")


def test_the_replace_one_kl_is_that_of_one_pruned_unit(make_measurements, bits):
    held = make_measurements()
    before = bits(held.model)
    found, measured = held.replace_one(48)
    assert bits(held.model) == before and measured.forward_tokens == 17 * 48
    part = CalibrationSet(held.text.search.samples[-2:], "")
    for u in range(8):
        for k in range(3):
            choice = tuple(k if v == u else 0 for v in range(8))
            expected = mean_kl(
                held.model, pruned_copy(held.model, held.database, held.table, held.menu, choice), part
            )
            assert found[u, k] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert (found[:, 0] == 0).all() and (found[:, 1:] > 1e-4).all()


def test_the_replace_one_kl_needs_no_dense_level_in_the_menu(make_measurements):
    with_dense, _ = make_measurements().replace_one(48)
    without, _ = make_measurements(menu=MENU[1:]).replace_one(48)
    assert without.shape == (8, 2) and without == pytest.approx(with_dense[:, 1:], rel=1e-6)


def test_errors_by_layer_are_summed_over_the_unit(make_measurements):
    held = make_measurements()
    layers = [layer.name for layer in held.table.layers]
    names = [level.name for level in MENU if not level.is_dense]

    def expected(samples):
        data = CalibrationSet(held.text.calibration.samples[:samples], "")
        found = fisher_errors(held.model, data, layers, names, held.database.weight)
        return np.array(
            [[0.0, *(sum(found[a.name][name] for a in unit.layers) for name in names)] for unit in held.table]
        )

    def expected_kfac():
        data = CalibrationSet(held.text.calibration.samples[:4], "")
        found = kfac_errors(held.model, data, layers, names, held.database.row_errors)
        return np.array(
            [[0.0, *(sum(found[a.name][name] for a in unit.layers) for name in names)] for unit in held.table]
        )

    assert held.error("kfac") == pytest.approx(expected_kfac(), rel=1e-6)
    assert held.error("fisher") == pytest.approx(expected(4), rel=1e-6)
    assert make_measurements(estimators={"fisher": FisherTrace(samples=2)}).error("fisher") == pytest.approx(
        expected(2), rel=1e-6
    )
    assert not np.allclose(expected(2), expected(4), rtol=1e-3)
    weight, output = held.database.errors(held.table)
    assert np.array_equal(held.error("weight"), weight) and np.array_equal(held.error("output"), output)
    assert not np.array_equal(weight, output)
