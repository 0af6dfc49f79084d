"""The command, on ranks whose weights accelerate shares out on the CPU, which it does by itself on accelerators only."""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from msp_plugin.cli import main
from msp_plugin.recovery import sharding


def start(self, *arguments, fsdp_plugin=None, _start=AcceleratorState.__init__, **options):
    new = not AcceleratorState._shared_state
    _start(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if new and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = start
sharding.gpus = lambda: 2


def fetch(own, shared, _fetch=sharding.fetch):
    assert any(isinstance(parameter, DTensor) for parameter in shared.parameters()), "nothing is shared out"
    _fetch(own, shared)


def give(own, shared, _give=sharding.give):
    print("continues from a checkpoint", file=sys.stderr)
    _give(own, shared)


sharding.fetch, sharding.give = fetch, give
if __name__ == "__main__":
    sys.exit(main())
