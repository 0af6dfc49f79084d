"""What a search believes of single moves: means over rounds, corrected by what was measured."""

import numpy as np
import pytest

from msp_plugin.allocators.local_model import LocalModel


def known(at=(0, 0, 0), decay=0.5):
    """A model of three units and levels in which every move costs 1 + 2: slope 1, curvature 2."""
    local = LocalModel(3, 3, decay)
    local.add(at, np.ones((4, 3, 3)), np.full((4, 3, 3), 2.0))
    return local


def test_known_move_gradients_fade_and_a_unit_that_moved_starts_anew():
    local = LocalModel(2, 3, decay=0.5)
    first_order, curvature_samples = np.ones((4, 2, 3)), np.full((4, 2, 3), 2.0)
    first_order[:, :, 0] = curvature_samples[:, :, 0] = np.nan
    local.add((0, 0), first_order, curvature_samples)
    assert local.cost().tolist() == [[0, 3, 3], [0, 3, 3]]
    local.add((0, 1), np.full((1, 2, 3), 7.0), np.zeros((1, 2, 3)))
    old = (0.5 * 4 * 3 + 7) / (0.5 * 4 + 1)
    assert local.cost() == pytest.approx(np.array([[0, old, old], [7, 0, 7]]))


def test_a_level_without_a_finite_slope_is_unknown_and_one_that_changes_nothing_costs_nothing():
    local = LocalModel(1, 4, decay=0.5)
    first_order = np.array([[[np.inf, np.nan, 0.0, 2.0]], [[1.0, np.nan, 0.0, np.nan]]])
    local.add((1,), first_order, np.array([[[0.0, np.nan, 0.0, np.inf]], [[2.0, np.nan, 0.0, 1.0]]]))
    assert local.cost().tolist() == [[3.0, 0.0, 0.0, np.inf]]


def test_what_a_move_changes_alone_replaces_its_prediction_until_its_unit_moves():
    local = known()
    local.correct_move((0, 1), 7.0)
    local.correct_move((1, 2), -1.0)
    assert local.cost().tolist() == [[0, 7, 3], [0, 3, -1], [0, 3, 3]]
    local.add((0, 1, 0), np.ones((4, 3, 3)), np.full((4, 3, 3), 2.0))
    assert local.cost()[0, 1] == 7 and local.cost()[1, 2] == 3
    assert np.argwhere(local.measured).tolist() == [[0, 1]]


def test_what_moves_changed_together_fades():
    local = known(decay=0.5)
    local.correct_joint_move((1, 1, 0), 16.0)
    local.add((0, 0, 0), np.ones((4, 3, 3)), np.full((4, 3, 3), 2.0))
    assert local.cost()[:2, 1].tolist() == [3 + 5 / 2] * 2


def test_a_move_whose_loss_is_infinite_is_ruled_out():
    local = known()
    local.correct_move((0, 1), np.inf)
    assert local.cost()[0, 1] == np.inf and np.isfinite(local.cost()).sum() == 8


def test_what_moves_change_together_is_charged_to_them_less_to_those_measured_alone():
    local = known()
    local.correct_joint_move((1, 1, 0), 16.0)  # 10 beyond 3 + 3
    assert local.cost().tolist() == [[0, 8, 3], [0, 8, 3], [0, 3, 3]]
    local = known()
    local.correct_move((0, 1), 3.0)
    local.correct_joint_move((1, 1, 0), 16.0)
    assert local.cost()[:2, 1] == pytest.approx([3 + 10 / 5, 3 + 10 * 4 / 5])


def test_a_joint_change_that_is_not_finite_says_nothing():
    local = known()
    local.correct_joint_move((1, 1, 0), np.inf)
    assert (local.cost()[:, 1:] == 3).all()
