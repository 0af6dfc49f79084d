"""Losses of candidates, by hand: a problem, its database, a pruned copy of a model, and KL from whole logits."""

import copy
import math
from contextlib import contextmanager

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights

MENU = parse_menu(["dense", "2:4", "1:4"])


def magnitude_levels(model, path, menu=MENU, target=1 / 2, data=None):
    """Return (a database of the model by magnitude, the problem that it serves)."""
    problem = AllocationProblem(prunable_layers(model), menu, target)
    database = LevelDatabase(path, {"test": "magnitude"}, menu)
    build_database(database, model, problem.table, Magnitude(), data)
    return database, problem


@contextmanager
def loss_of(model, measured, data, *args, **options):
    """Yield a prepared loss, while the candidates' weights are exchanged."""
    with CandidateWeights(model, *measured) as weights:
        yield CandidateLoss(weights, data, *args, **options).prepare()


def pruned_copy(model, database, table, menu, choice):
    """Return a copy of the model that holds the database's weights of a choice."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for unit, k in zip(table, choice, strict=True):
            for layer in unit.layers if not menu[k].is_dense else ():
                other.get_submodule(layer.name).weight.copy_(database.weight(layer.name, menu[k].name))
    return other


def quality_by_hand(dense, candidate, samples):
    """Return (KL(dense || candidate) in nats per token, perplexity of the candidate), from float64 logits."""
    kl, loss, positions, targets = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for ids in samples:
            p, q = (model(ids[None]).logits[0].double().log_softmax(-1) for model in (dense, candidate))
            kl += float((p.exp() * (p - q)).sum())
            loss -= float(q[:-1].gather(1, ids[1:, None]).sum())
            positions, targets = positions + len(ids), targets + len(ids) - 1
    return kl / positions, math.exp(loss / targets)


def kl_by_hand(dense, candidate, samples):
    return quality_by_hand(dense, candidate, samples)[0]


def places(model):
    """Where the storage of each parameter lies, and the parameter itself."""
    return {name: (id(p), p.data_ptr(), p.shape) for name, p in model.named_parameters()}


def two_lengths():
    """Seven samples of two lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = (12, 12, 12, 12, 7, 7, 12)
    return CalibrationSet(tuple(torch.randint(0, 64, (n,), generator=generator) for n in lengths), "random")


def own_forwards(model):
    """The modules whose forward was replaced."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]
