"""Training data as a function of the sample number, whatever the workers, the ranks, or the iteration resumed at."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import Any, Iterator, Optional

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ucdir_plugin.diffusion.noise import generator, key_to_seed
from ucdir_plugin.utils.errors import STORAGE, UserError
from ucdir_plugin.utils.files import is_gone

PATIENCE = 5.0
"""Seconds that a training which is asked to stop waits for its next images, and then for the workers to end."""


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
    """End the workers of a loader's iterator, also after an error (at exit, Python would wait for them for ever).

    Those that hang, at a file of a disk that does not answer, are killed after :data:`PATIENCE`.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is None:
        return
    kill = threading.Timer(PATIENCE, lambda: [worker.kill() for worker in iterator._workers])
    kill.start()
    with _unnoticed_ends():
        shut_down()
    kill.cancel()


@contextmanager
def _unnoticed_ends() -> Iterator[None]:
    """Without torch's handler, which raises when a worker is killed."""
    if not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


class PatientDataset(Dataset):
    """Any dataset that waits where its disk is away: an NFS mount that hangs up for a minute ends no training.

    Away means that the system says so (:data:`ucdir_plugin.utils.errors.STORAGE`), or that a folder of the options
    (``dataroot_gt``, ``dataroot_lq``) is missing or empty. A single file that is missing is an error at once.

    Args:
        wait: for so many seconds; then the error is raised.
    """

    def __init__(self, dataset: Dataset, wait: float):
        self.dataset, self.wait = dataset, wait
        self.opt = getattr(dataset, "opt", {})

    def __getitem__(self, key: Any) -> Any:
        started, pause = time.monotonic(), 0.1
        while True:
            try:
                return self.dataset[key]
            except (OSError, UserError) as err:
                away, waited = self._away(err), time.monotonic() - started
                if away is None:
                    raise
                if waited >= self.wait:
                    raise UserError(f"{away} does not answer, waited {waited:.0f} s: {err}") from err
                if pause == 0.1:
                    print(f"warning: {away} does not answer: waiting up to {self.wait:.0f} s", file=sys.stderr)
                time.sleep(min(pause, max(self.wait - waited, 0)))
                pause = min(2 * pause, 10)

    def _away(self, err: Exception) -> Optional[str]:
        """The folder or file that does not answer, None if that is not what is wrong."""
        roots = [value for key, value in self.opt.items() if key.startswith("dataroot") and value]
        found = next((root for root in roots if is_gone(root)), None)
        cause = err if isinstance(err, OSError) else err.__cause__
        if found is None and isinstance(cause, OSError) and cause.errno in STORAGE:
            return cause.filename or ", ".join(roots)
        return found

    def __len__(self) -> int:
        return len(self.dataset)


def training_loader(dataset: Dataset, opt: dict, sampler: EndlessSampler) -> DataLoader:
    """An endless loader of one rank's batches, ``sampler.batch`` each, with BasicSR's loader options."""
    return DataLoader(
        PatientDataset(KeyedDataset(dataset, sampler.seed), opt["wait_for_data"]),
        batch_size=sampler.batch,
        sampler=sampler,
        num_workers=opt["num_worker_per_gpu"],
        pin_memory=opt["pin_memory"],
        worker_init_fn=_leave_signals_to_the_trainer,
    )
