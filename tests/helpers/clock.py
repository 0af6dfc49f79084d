"""A clock that runs on while losses are measured."""

import time

from msp_plugin.search.candidate_loss import CandidateLoss


def make_losses_slow(monkeypatch):
    """Let every candidate's loss take 1,000 seconds of ``time.monotonic``; returns [the seconds so far]."""
    late, now, loss = [0.0], time.monotonic, CandidateLoss.__call__

    def slow(self, *args):
        late[0] += 1000.0
        return loss(self, *args)

    monkeypatch.setattr(time, "monotonic", lambda: now() + late[0])
    monkeypatch.setattr(CandidateLoss, "__call__", slow)
    return late
