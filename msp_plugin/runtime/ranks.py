"""Several processes on one run, as ``torchrun`` starts them.

Every rank runs the same code on the same model and text; the costly measurements are shared out, and each rank
gets the results of all, in an order that does not depend on how many there are. So each rank takes the same
decisions, and they are those of one process, to the bit on a CPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from msp_plugin.errors import HostError, MSPError, shown
from msp_plugin.runtime.disk import is_full

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

T = TypeVar("T")


class ElsewhereError(MSPError):
    """Another rank failed, and its error is the one to tell."""


class LostError(HostError):
    """Another rank has ended."""


class Ranks:
    """The processes of a run: this one alone."""

    rank = 0
    size = 1
    #: What the last failed gather raised here, as on all other ranks.
    raised: Exception | None = None

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's items: every ``size``-th."""
        return list(items[self.rank :: self.size])

    def gather(self, make: Callable[[], T]) -> list[T]:
        """Return what ``make`` returns on each rank, in the order of the ranks, on every rank.

        Raises:
            MSPError: the first that ``make`` raised, on every rank.
            LostError: a rank has ended.
        """
        return [make()]

    def spread(self, items: Sequence[T], make: Callable[[T], object]) -> list:
        """Return ``make`` of every item, in their order, on every rank; each item is done by one of them.

        Raises: see gather.
        """
        parts = self.gather(lambda: [make(item) for item in self.share(items)])
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def first(self, make: Callable[[], T]) -> T:
        """Return what ``make`` returns on rank 0, on every rank; the others wait.

        Raises: see gather.
        """
        return self.gather(lambda: make() if self.rank == 0 else None)[0]

    def together(self, work: Callable[[], object]) -> None:
        """Do work that meets the other ranks, so that it succeeds or fails on all of them.

        What fails on one rank alone is told in its part of the others' next gather. So all ranks have met equally
        often afterwards, and may go on with the next work.

        Raises:
            MSPError: this rank's or another's; what is none, such as a plugin's bug, is told as one.
            LostError: a rank has ended.
            OSError, or what is made of that of a full disk: not told: this rank must end.
        """
        try:
            work()
        except (LostError, OSError):
            raise
        except Exception as error:
            if is_full(error):
                raise
            if error is not self.raised:
                told = error if isinstance(error, MSPError) else MSPError(f"{type(error).__name__}: {error}")
                self.gather(partial(_raise, told))
            raise
        self.gather(lambda: None)

    @property
    def next(self) -> int:
        """The rank after this one; the first after the last."""
        return (self.rank + 1) % self.size

    def send(self, rank: int, tensor: torch.Tensor | None) -> Callable[[], None]:
        """Begin to send a tensor, None for one that will not come; return what waits until it has been read.

        Until then the tensor must stay as it is. A rank that fails sends None to the one that waits for it, and
        then goes to the next ``gather``, which raises its error everywhere.
        """
        raise NotImplementedError("one process has nobody to send to")

    def receive(self, rank: int) -> torch.Tensor:
        """Wait for the next tensor that a rank sends to this one, and return it, on the CPU.

        What was sent before the last ``gather`` is not received after it.

        Raises:
            ElsewhereError: it will not come.
            LostError: the rank has ended.
        """
        raise NotImplementedError("one process has nobody to receive from")

    def leave(self) -> None:
        """End the sharing: rank 0 goes on alone."""


def _said(error: Exception) -> tuple[str, str, int]:
    """Return message, hint and exit code of an error, as other ranks tell them."""
    if isinstance(error, MSPError):
        return error.message, error.hint, error.exit_code
    return f"{type(error).__name__}: {error}", "its own output says more", MSPError.exit_code


def _raise(error: MSPError) -> None:
    raise error


ALONE = Ranks()


class TorchRanks(Ranks):
    """The ranks of ``torch.distributed``, over gloo: what they exchange are numbers on the CPU."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        #: Nobody waits until these are read, and they would be lost with the objects.
        self._last_words: list = []
        #: Gathers so far, on every rank: the tag of what is sent, so that nothing of a failed work is read later.
        self._meetings = 0

    def gather(self, make: Callable[[], T]) -> list[T]:
        import torch.distributed as dist

        value, own, told = None, None, None
        try:
            value = make()
        except LostError:
            raise
        except Exception as error:
            own = error
            told = (isinstance(own, ElsewhereError), *_said(own))
        self._meetings += 1
        found: list = [None] * self.size
        with self._alive():
            dist.all_gather_object(found, (value, told))
        failed = [(error[0], rank, error[1:]) for rank, (_, error) in enumerate(found) if error is not None]
        if failed:
            _, rank, (message, hint, code) = min(failed)
            if rank == self.rank:
                self.raised = own
                raise own
            other = MSPError(f"rank {rank}: {message}", hint=hint)
            other.exit_code = code
            self.raised = other
            raise other
        return [value for value, _ in found]

    def send(self, rank: int, tensor: torch.Tensor | None) -> Callable[[], None]:
        import torch
        import torch.distributed as dist

        parts = [_header(tensor)]
        if tensor is not None:
            parts.append(tensor.cpu().contiguous().view(-1).view(torch.uint8))
        with self._alive():
            works = [(dist.isend(part, rank, tag=self._meetings), part) for part in parts]
        if tensor is None:
            self._last_words += works

        def wait() -> None:
            with self._alive():
                for work, _ in works:
                    work.wait()

        return wait

    def receive(self, rank: int) -> torch.Tensor:
        import torch
        import torch.distributed as dist

        header = torch.empty_like(_header(None))
        with self._alive():
            dist.recv(header, rank, tag=self._meetings)
        comes, dtype, dims, *shape = header.tolist()
        if not comes:
            raise ElsewhereError(f"rank {rank} failed")
        found = torch.empty(shape[:dims], dtype=_dtypes()[dtype])
        with self._alive():
            dist.recv(found.view(-1).view(torch.uint8), rank, tag=self._meetings)
        return found

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Raise a HostError if another rank ends in the body."""
        try:
            yield
        except RuntimeError as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LostError(
                f"rank {self.rank} stops, because another rank has ended ({said})",
                hint="that one's own error says why. The same command goes on where it stopped",
            ) from error

    def leave(self) -> None:
        import torch.distributed as dist

        self.gather(lambda: None)
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # a host that reads them would wait for ranks that have left


def _dtypes() -> tuple[torch.dtype, ...]:
    import torch

    return (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _header(tensor: torch.Tensor | None) -> torch.Tensor:
    """Return int64[11]: whether a tensor comes, its dtype's number, its dimensions, and up to eight of them."""
    import torch

    if tensor is None:
        return torch.zeros(11, dtype=torch.int64)
    shape = list(tensor.shape)
    return torch.tensor([1, _dtypes().index(tensor.dtype), len(shape), *shape, *[0] * (8 - len(shape))])


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks a launcher says that there are; 1 without one.

    Raises:
        HostError: what it says is no number.
    """
    size = environment.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise HostError(f"WORLD_SIZE is {shown(size)}, no number of ranks", hint="unset it, or use torchrun")
    return int(size)


def join(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return the ranks of this process: those of ``torchrun`` where it was started by it, else itself.

    Raises:
        HostError: the ranks do not find each other.
    """
    if world_size(environment) < 2:
        return ALONE
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group("gloo", timeout=timedelta(hours=12))  # rank 0 may build for hours
    except (RuntimeError, ValueError) as error:
        raise HostError(
            f"torch.distributed does not start: {error}", hint="start it with torchrun"
        ) from error
    ranks = TorchRanks()
    log.info("rank %d of %d", ranks.rank, ranks.size)
    return ranks
