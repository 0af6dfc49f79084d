"""Several processes on one run, as ``torchrun`` starts them.

Every rank runs the same code on the same model and text. Samples, candidates and layers are shared out; each rank gets
the results of all of them, so that all ranks take the same decisions. They meet through ``torch.distributed`` alone.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from msp_plugin.errors import HostError, MSPError, shown

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class LostError(HostError):
    """Another rank has ended."""


class Ranks:
    """The ranks of a run that is this process alone; TorchRanks stands for several.

    All methods but ``share`` are collective: every rank must call the same ones in the same order. An error on one
    rank is raised on all of them. If a rank ends, the others raise LostError.
    """

    rank = 0
    size = 1
    #: The last error that all ranks have raised.
    _raised: Exception | None = None

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's items: every ``size``-th."""
        return list(items[self.rank :: self.size])

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Return what ``work`` returns on each rank, in the order of the ranks, on every rank.

        Raises:
            Exception: what ``work`` raised here.
            MSPError: what it raised on another rank, the first one, where it succeeded here.
            LostError: a rank has ended.
        """
        if self.size == 1:
            return [work()]
        value, failure = None, None
        try:
            value = work()
        except LostError:
            raise
        except Exception as error:
            failure = error
        self._any_failed(failure is not None)  # answers all_reduce_sum on the others
        return self._gather(value, failure)

    def _gather(self, value: T | None, failure: Exception | None) -> list[T]:
        """Return each rank's value, or raise what ``gather`` promises if a rank has failed."""
        try:
            parts = self._all_gather((value, failure and _described(failure)))
        except LostError:
            raise
        except Exception as error:  # a value that cannot be sent
            failure = error
            parts = self._all_gather((None, _described(error)))
        failed = next((rank for rank, (_, described) in enumerate(parts) if described), None)
        if failed is None:
            return [value for value, _ in parts]
        if failure is None:
            failure = _error_of(failed, *parts[failed][1])
        self._raised = failure
        raise failure

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return the result of ``work`` for every item, in order, on every rank; one rank does each item.

        Raises: see gather.
        """
        parts = self.gather(lambda: [work(item) for item in self.share(items)])
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns on rank 0, on every rank; the others wait.

        Raises: see gather.
        """
        return self.gather(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value] # not None on rank 0

    def collective(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns here; ``work`` itself makes collective calls, and fails on all ranks or none.

        A rank that fails between two calls answers the others' next call with its error. So all ranks have made
        equally many calls afterwards and can continue with other work.

        Raises: see gather.
        """
        if self.size == 1:
            return work()
        try:
            value = work()
        except LostError:
            raise
        except Exception as error:
            if error is not self._raised:
                self.gather(partial(_raise, error))
            raise
        self.gather(lambda: None)
        return value

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of the ranks' tensors of one shape and dtype; ``tensor`` may be overwritten.

        The same number of ranks gives the same bytes.

        Raises: see gather.
        """
        if self.size == 1:
            return tensor
        own = tensor.cpu().contiguous()
        if self._any_failed(False):
            self._gather(None, None)
        return self._all_reduce(own).to(tensor.device)

    def leave(self) -> None:
        """Stop sharing work; the caller continues on rank 0 alone."""

    def _any_failed(self, failed: bool) -> bool:
        """Return True if a rank has failed. Exchanging one number takes less time than a gather."""
        return failed

    def _all_gather(self, value: Any) -> list[Any]:
        return [value]

    def _all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


ALONE = Ranks()


def _described(error: Exception) -> tuple[str, str | None, int]:
    """Return (message, hint, exit code) of an error, for the other ranks."""
    if isinstance(error, MSPError):
        return error.message, error.hint, error.exit_code
    return f"{type(error).__name__}: {error}", "see its own output", MSPError.exit_code


def _error_of(rank: int, message: str, hint: str | None, code: int) -> MSPError:
    error = MSPError(f"rank {rank}: {message}", hint=hint)
    error.exit_code = code
    return error


def _raise(error: Exception) -> NoReturn:
    raise error


class TorchRanks(Ranks):
    """The ranks of ``torch.distributed``, over gloo: numbers travel through the CPU."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def _any_failed(self, failed: bool) -> bool:
        import torch
        import torch.distributed as dist

        flag = torch.tensor(int(failed))
        with self._lost_ranks():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _all_gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._lost_ranks():
            dist.all_gather_object(values, value)
        return values

    def _all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        with self._lost_ranks():
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def _lost_ranks(self) -> Iterator[None]:
        """Raise LostError where a collective of torch fails: another rank has ended."""
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LostError(
                f"rank {self.rank} stops, because another rank has ended ({reason})",
                hint="its own error says why. The same command continues where it stopped",
            ) from error

    def leave(self) -> None:
        import torch.distributed as dist

        self.gather(lambda: None)
        dist.destroy_process_group()
        atexit.unregister(_destroy_process_group)  # a group that starts later is not ours
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # a host that reads them would wait for ranks that have left


def _destroy_process_group() -> None:
    """Stop torch's threads; a process that ends while they run may abort instead of returning its exit code."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that a launcher has started; 1 without a launcher.

    Raises:
        HostError: WORLD_SIZE is not a number.
    """
    size = environment.get("WORLD_SIZE") or "1"
    if not size.isdecimal():
        raise HostError(
            f"WORLD_SIZE is {shown(size)}, expected a number of ranks", hint="unset it, or use torchrun"
        )
    return int(size)


def asks_for_fsdp(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if accelerate's launcher has asked its ranks to share weights out by FSDP."""
    return environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # accelerate takes no other word


def join(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return the ranks that ``torchrun`` has started, this process alone where it has not.

    Raises:
        HostError: the ranks do not find each other.
    """
    if world_size(environment) < 2:
        return ALONE
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    backend = "gloo"
    if asks_for_fsdp(environment):
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # which loads a model on one rank alone
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # a rank may prune a layer for hours
    except (RuntimeError, ValueError) as error:
        raise HostError(
            f"torch.distributed does not start: {error}", hint="start it with torchrun"
        ) from error
    atexit.register(_destroy_process_group)
    ranks = TorchRanks()
    log.info("rank %d of %d", ranks.rank, ranks.size)
    return ranks
