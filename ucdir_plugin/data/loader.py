"""Training data as a function of the sample number, whatever the workers, the ranks, or the iteration resumed at."""

from __future__ import annotations

import random
import signal
from typing import Any, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ucdir_plugin.diffusion.noise import generator, key_to_seed
from ucdir_plugin.errors import UserError


def seed_cpu(*key: int | str) -> None:
    """Seed python, numpy and torch (CPU) from a key."""
    seed = key_to_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class EndlessSampler(Sampler):
    """Endless shuffled (index, sample number) pairs of one rank, starting anywhere.

    Sample number p, counted over all ranks from the start of the training, is entry p mod n of the permutation of epoch
    p // n. The global batch of iteration i (from 0) holds the numbers i * B .. (i + 1) * B - 1, of which each rank
    takes an equal run.

    Args:
        size: images in the dataset, n.
        batch: images per iteration on one rank.
        start: iterations already done.
    """

    def __init__(self, size: int, batch: int, rank: int, world_size: int, seed: int, start: int = 0):
        self.size, self.batch, self.rank, self.world_size, self.seed, self.start = (
            size,
            batch,
            rank,
            world_size,
            seed,
            start,
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = -1, []
        iteration = self.start
        while True:
            first = (iteration * self.world_size + self.rank) * self.batch
            for number in range(first, first + self.batch):
                if number // self.size != epoch:
                    epoch = number // self.size
                    order = torch.randperm(self.size, generator=generator(self.seed, "epoch", epoch)).tolist()
                yield order[number % self.size], number
            iteration += 1


class KeyedDataset(Dataset):
    """Any dataset, its random augmentation made a function of the sample number that :class:`EndlessSampler` gives.

    Raises:
        UserError: naming an image that is not finite.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self.opt = getattr(dataset, "opt", {})

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, number = key
        seed_cpu(self.seed, "data", number)
        item = self.dataset[index]
        if isinstance(item, dict):
            for name, value in item.items():  # of images: a condition that is left out is NaN
                if torch.is_tensor(value) and value.dim() > 2 and not bool(value.isfinite().all()):
                    path = item.get(f"{name}_path", item.get("key", f"number {index}"))
                    raise UserError(f"image {path} ({name}) holds NaN or infinite values")
            item["sample_number"] = number
        return item

    def __len__(self) -> int:
        return len(self.dataset)


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach the workers too; the trainer still needs them to finish its step.

    So it has to end them itself: :func:`close`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def close(iterator: Iterator) -> None:
    """End the workers of a loader's iterator, also after an error (at exit, Python would wait for them for ever)."""
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def training_loader(dataset: Dataset, opt: dict, sampler: EndlessSampler) -> DataLoader:
    """An endless loader of one rank's batches, ``sampler.batch`` each, with BasicSR's loader options."""
    return DataLoader(
        KeyedDataset(dataset, sampler.seed),
        batch_size=sampler.batch,
        sampler=sampler,
        num_workers=opt["num_worker_per_gpu"],
        pin_memory=opt["pin_memory"],
        worker_init_fn=_leave_signals_to_the_trainer,
    )
