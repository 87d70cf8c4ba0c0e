"""The processes that train together: which one this is, and what goes between them.

By default there is one, and nothing here communicates. Under a launcher (`torchrun`, or `train.launch`) every process
holds all examples, takes its share of each step, and the sums make them one. How processes are started, and what
becomes of their errors, is `launch`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, Store  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a rank waits for another: one may be downloading, or writing a checkpoint. Launchers see to dead ones."""

_BUCKET_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Among those of its machine."""
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, found: list[T]) -> list[T]:
        """The lists of all processes, one after another; small ones, for messages."""
        if self.count == 1:
            return found
        lists: list[list[T]] = [[] for _ in range(self.count)]
        dist.all_gather_object(lists, found)
        return [item for items in lists for item in items]

    def once(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, in all of them."""
        if self.count == 1:
            return work()
        box = [work() if self.first else None]
        dist.broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Until every process is here."""
        self.gather([])

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by one process of each machine at a time."""
        found: list[T] = []
        # as many rounds on every machine: `wait` is for all of them
        for turn in range(max(self.gather([self.local_count]))):
            if turn == self.local_rank:
                found.append(work())
            self.wait()
        return found[0]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every process's gradients the sum of all; a parameter that none has a gradient for keeps none.

        One sum per step in flat buckets, after all micro-batches. PyTorch's DistributedDataParallel would hook into
        every backward pass of the module that it wraps: of a policy that runs a rounded copy it would send 16-bit
        gradients, and its hooks see neither the decoder nor the head being called by themselves.
        """
        if self.count == 1:
            return
        parameters = list(parameters)
        found = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        gradients = []
        for parameter, known in zip(parameters, self.sum(found.to(parameters[0].device)).tolist(), strict=True):
            if known and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = self.sum(torch.cat([gradient.flatten() for gradient in bucket]))
            sizes = [gradient.numel() for gradient in bucket]
            for gradient, summed in zip(bucket, flat.split(sizes), strict=True):
                gradient.copy_(summed.view_as(gradient))


@contextmanager
def joined(ranks: Ranks, device: str, store: Store | None = None) -> Iterator[None]:
    """Be one of the processes that meet at `store` while the block lasts; `device` is cpu or cuda."""
    if ranks.count > 1:
        # those of one machine share its cores
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.local_count))
    if not ranks.first:
        warnings.simplefilter("ignore")  # the first says the same
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    # gloo too on a GPU, for what lies on the CPU: offloaded weights, and messages
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store = store or HashStore()
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.count, store=store, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in lists of one precision and some size: a single flat copy of all would be as large as the model."""
    bucket: list[Tensor] = []
    room = _BUCKET_BYTES
    for gradient in sorted(gradients, key=lambda gradient: str(gradient.dtype)):
        if bucket and (gradient.nbytes > room or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, room = [], _BUCKET_BYTES
        bucket.append(gradient)
        room -= gradient.nbytes
    if bucket:
        yield bucket
