"""Stopping a training: signals, losses that are not finite, ranks and workers that are lost."""

from __future__ import annotations

import contextlib
import math
import signal
from typing import Any, Iterator

import torch
import torch.distributed as dist

from ucdir_plugin.utils.errors import Stopped, UserError
from ucdir_plugin.utils.protocols import LogsLosses


class Stop:
    """SIGTERM (a cluster's) and Ctrl-C: finish the step, save, leave. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.signal, self._leaves, self._patience = 0, False, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        if hasattr(signal, "SIGALRM"):  # not on Windows
            signal.signal(signal.SIGALRM, self._leave)

    def _ask(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self._patience and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, self._patience)
        else:
            self._leave(number, frame)

    def _leave(self, _number: int, _frame: Any) -> None:
        if self._leaves:
            self._leaves = False
            raise Stopped(self.signal)

    @contextlib.contextmanager
    def at_once(self, patience: float = 0.0) -> Iterator[None]:
        """A block that may take long and changes no weights: it is left in the middle. No exchange between ranks in it.

        Args:
            patience: it is given so many seconds to come to its end.

        Raises:
            Stopped: where the signal comes.
        """
        try:
            self._leaves, self._patience = True, patience
            if self.signal:
                raise Stopped(self.signal)
            yield
        except Exception as err:
            if self.signal:  # it may have ended what the block needs: the loader's workers, or what forks them
                raise Stopped(self.signal) from err
            raise
        finally:
            self._leaves, self._patience = False, 0.0
            if patience and hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)

    def agree(self, opt: dict, device: torch.device) -> None:
        """All ranks go on, or none.

        Raises:
            Stopped: on all ranks, if one was asked to stop.
        """
        if self.asked(opt, device):
            raise Stopped(self.signal)

    def asked(self, opt: dict, device: torch.device) -> bool:
        """Whether any rank was asked to stop."""
        if not opt["dist"]:
            return bool(self.signal)
        flag = torch.tensor(int(self.signal), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.signal = int(flag)
        return bool(self.signal)


class FiniteLosses:
    """Stops models that do not look at their losses themselves (BasicSR's) once they are lost."""

    def __init__(self, limit: int = 10):
        self.limit, self.bad = limit, 0

    def look(self, model: Any, iteration: int) -> None:
        """Look at the losses of a step.

        Raises:
            UserError: after ``limit`` iterations in a row with a logged loss that is not finite.
        """
        losses = model.log_dict.values() if isinstance(model, LogsLosses) else ()
        self.bad = self.bad + 1 if any(not math.isfinite(v) for v in losses) else 0
        if self.bad >= self.limit:
            raise UserError(
                f"training stopped at iteration {iteration}: {self.bad} steps in a row without a finite loss;"
                " the last checkpoint before them is kept. Lower the learning rate, or check the data"
            )


def is_of_lost_rank(err: Exception) -> bool:
    """Whether it is what a collective raises where another rank has ended, or keeps the others waiting."""
    return dist.is_initialized() and (isinstance(err, dist.DistError) or "gloo" in str(err))


def is_of_lost_worker(err: Exception) -> bool:
    """Whether it is what torch raises, wherever the process is, once a worker of its loader has been killed."""
    return isinstance(err, RuntimeError) and str(err).startswith("DataLoader worker")
