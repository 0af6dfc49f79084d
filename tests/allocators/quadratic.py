"""A problem and its made-up loss: an exact quadratic function of the choice, with cross terms between units."""

import itertools
import math

import numpy as np

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable

LENGTHS = (7, 5, 9, 6, 8, 4)
SHAPES = [(4, 24), (16, 48), (1, 24), (8, 48), (3, 96), (2, 24)] * 2


def problem_of(shapes, levels=DEFAULT_LEVELS, target="5/8", allowed=None):
    units = tuple(Unit(str(u), u, (Layer(str(u), *shape),)) for u, shape in enumerate(shapes))
    return AllocationProblem(UnitTable(units), parse_menu(levels), parse_sparsity(target), allowed)


class QuadraticLoss:
    """1/2 (w - v)^T H_s (w - v) for sample s: w the dense weights, v the choice's. H_s has cross terms.

    Every unit has four numbers, which fade as it keeps less. Remembers what was asked for.
    """

    def __init__(self, problem, seed=0, sample_seed=0, cross=1.0, noise=0.3, lengths=LENGTHS):
        rng, units = np.random.default_rng(seed), len(problem.table)
        sizes = np.array([unit.weights for unit in problem.table])
        gone = 1 - problem.kept / sizes[:, None]
        fade = rng.uniform(0.7, 1.8, (units, 1, 4))
        self.change = -rng.normal(0, 1, (units, 1, 4)) * gone[:, :, None] ** fade
        root = rng.normal(0, 1, (units * 4, units * 4)) * rng.lognormal(0, 0.7, units).repeat(4)
        own = np.kron(np.eye(units), np.ones((4, 4)))
        shared = root * (own + cross * (1 - own))
        noises = np.random.default_rng(1000 + sample_seed).normal(0, noise, (len(lengths), *root.shape))
        self.hessians = [
            (shared + n * own).T @ (shared + n * own) / units if cross else own * ((root + n).T @ (root + n))
            for n in noises
        ]
        self.lengths, self.forward_tokens = tuple(lengths), 0
        self.full, self.few, self.kept, self.asked = [], [], [], []
        self.odd = {}

    def exact(self, choice, samples=None):
        """The loss without counting or remembering."""
        numbers = range(len(self.lengths)) if samples is None else samples
        x = self.change[np.arange(len(choice)), list(choice)].ravel()
        tokens = [self.lengths[i] for i in numbers]
        return float(np.average([0.5 * x @ self.hessians[i] @ x for i in numbers], weights=tokens))

    def __call__(self, choice, samples=None):
        (self.full if samples is None else self.few).append(choice)
        self.forward_tokens += sum(self.lengths if samples is None else (self.lengths[i] for i in samples))
        return self.odd.get(choice, self.exact(choice, samples))

    def move_gradients(self, choice, samples, reach, seed):
        self.asked.append((choice, tuple(samples), reach, seed))
        self.forward_tokens += 5 * sum(self.lengths[i] for i in samples)
        units, levels = self.change.shape[:2]
        x = self.change[np.arange(units), list(choice)].ravel()
        first_order, curvature_samples = np.full((2, len(samples), units, levels), np.nan)
        for s, i in enumerate(samples):
            gradient = (self.hessians[i] @ x).reshape(units, 4)
            for u, k in itertools.product(range(units), range(levels)):
                if 0 < abs(k - choice[u]) <= reach:
                    d = self.change[u, k] - self.change[u, choice[u]]
                    block = self.hessians[i][4 * u : 4 * u + 4, 4 * u : 4 * u + 4]
                    first_order[s, u, k], curvature_samples[s, u, k] = (
                        gradient[u] @ d,
                        math.sqrt(max(d @ block @ d, 0.0)),
                    )
        return first_order, curvature_samples

    def set_incumbent(self, choice):
        self.kept.append(choice)


def inputs_of(problem, loss=None, holdout="other text", seed=0, progress=lambda *at: None, number=0):
    loss = loss or QuadraticLoss(problem, number)
    if holdout == "other text":
        holdout = QuadraticLoss(problem, number, sample_seed=1, lengths=(6, 8, 5))
    blocks = np.mean(loss.hessians, axis=0).reshape(len(problem.table), 4, len(problem.table), 4)
    blocks = np.stack([blocks[u, :, u] for u in range(len(problem.table))])
    errors = {
        "weight": (loss.change**2).sum(-1),
        "output": np.einsum("uki,uij,ukj->uk", loss.change, blocks, loss.change),
        "fisher": 0.5 * np.einsum("uki,uii->uk", loss.change**2, blocks),
        "kfac": 0.5 * np.einsum("uki,uij,ukj->uk", loss.change, blocks, loss.change),
    }
    trace = np.einsum("uii->u", blocks)
    return AllocationInputs(problem, {"fisher": trace}, errors, loss, seed, progress, holdout)
