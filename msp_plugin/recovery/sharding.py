"""Training whose weights, gradients and optimizer state are shared out among the ranks: FSDP, as accelerate is configured.

It needs peft and accelerate, so that this file is imported inside functions only.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel

from msp_plugin.errors import HostError
from msp_plugin.runtime.ranks import asks_for_fsdp, world_size

log = logging.getLogger(__name__)

#: What checkpointing of activations by FSDP puts into the names of parameters.
_WRAPPED = "_checkpoint_wrapped_module."


def gpus() -> int:
    """Return how many GPUs this machine has."""
    return torch.cuda.device_count()


def is_sharded() -> bool:
    """Return True if accelerate shares weights out among these ranks, which it does on GPUs only."""
    return asks_for_fsdp() and world_size() > 1 and gpus() > 0


def check_sharding(*, gradient_checkpointing: bool) -> None:
    """Raise HostError if accelerate is configured to share weights out in a way that is not supported."""
    if not asks_for_fsdp():
        return
    if not is_sharded():
        log.warning("FSDP needs several ranks with a GPU each: weights are not shared out")
        return
    asked = os.environ.get
    if (version := asked("FSDP_VERSION", "1")) != "2":
        raise HostError(f"accelerate is configured for FSDP {version}", hint="set fsdp_version to 2")
    if asked("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        raise HostError(
            "accelerate is configured to share out modules by size, and lists of blocks are no such modules",
            hint="set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP",
        )
    if gradient_checkpointing and asked("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        raise HostError(
            "both accelerate's configuration and gradient_checkpointing ask for checkpointing of activations",
            hint="leave one of them out",
        )
    here = int(asked("LOCAL_WORLD_SIZE") or 1)
    if here > gpus():
        raise HostError(
            f"{here} processes share {gpus()} GPUs, and FSDP needs one for each",
            hint="start fewer processes",
        )


@contextmanager
def shared_out(adapted: PeftModel, head: torch.nn.Module | None) -> Iterator[PeftModel]:
    """Yield a copy of a model with an adapter, on the CPU, from which FSDP takes each rank's parts.

    The model itself stays whole, and waits on the CPU meanwhile: checkpoints of the adapter and its merge need that. Until
    training begins a process holds both.

    Args:
        head: of the model, apart from it, which may share its embedding's weight; it stays where it is.
    """
    device = next(adapted.parameters()).device
    adapted.to("cpu")
    if head is not None:
        head.to(device)
    try:
        with warnings.catch_warnings():  # nothing here changes an output in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            yield copy.deepcopy(adapted)
    finally:
        gc.collect()  # the Trainer refers to itself: what it held on a GPU goes before the model comes back
        adapted.to(device)


def fetch(own: PeftModel, shared: PeftModel) -> None:
    """Copy the trained parameters of a model that is shared out into a whole one; all ranks do it together."""
    found = _trained(shared)
    with torch.no_grad():
        for name, parameter in _trained(own).items():
            parameter.copy_(_whole(found[name]))


def give(own: PeftModel, shared: PeftModel) -> None:
    """Copy the trained parameters of a whole model into one that is shared out, each rank its parts."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    found = _trained(shared)
    with torch.no_grad():
        for name, parameter in _trained(own).items():
            to = found[name]
            if isinstance(to, DTensor):
                value = parameter.detach().to(to.to_local().device)
                to.to_local().copy_(
                    distribute_tensor(value, to.device_mesh, to.placements, src_data_rank=None).to_local()
                )
            else:
                to.copy_(parameter)


def part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that ranks may have shared out."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _trained(adapted: PeftModel) -> Mapping[str, torch.Tensor]:
    """Return the parameters of an adapter by name, whether they are trained just now or not."""
    prefix = adapted.base_model.prefix
    named = ((name.replace(_WRAPPED, ""), parameter) for name, parameter in adapted.named_parameters())
    return {name: parameter for name, parameter in named if prefix in name}
