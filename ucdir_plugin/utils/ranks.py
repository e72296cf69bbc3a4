"""Which part of a folder is this process's, by the variables of torchrun or slurm. No process group is needed.

Nothing is exchanged while images are restored, so that a rank that is lost stops no other, and which images are whose
follows from their order alone: any number of ranks may go on where others stopped.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import List, Mapping, NamedTuple, Sequence, TypeVar

import torch.distributed as dist

from ucdir_plugin.utils.errors import UserError

T = TypeVar("T")

LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
"""Variables of rank, number of ranks, and rank on this machine; torchrun under srun is torchrun."""


class Share(NamedTuple):
    """Rank ``rank`` of ``world``, ``local`` on its own machine; without a launcher the whole."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def take(self, items: Sequence[T]) -> List[T]:
        """Every ``world``-th item: the shares are disjoint, and together all."""
        return list(items[self.rank :: self.world])


def own_share(environment: Mapping[str, str] = os.environ) -> Share:
    """The share of this process.

    Raises:
        UserError: for variables that contradict each other; in slurm's batch script, which is none of its tasks.
    """
    for rank, world, local in LAUNCHERS.values():
        if rank not in environment or world not in environment:
            continue
        try:
            found = Share(int(environment[rank]), int(environment[world]), int(environment.get(local, 0)))
        except ValueError as err:
            raise UserError(f"{rank} and {world} are no numbers; unset them, or start with torchrun or srun") from err
        if not 0 <= found.rank < found.world:
            raise UserError(
                f"{rank}={found.rank} is none of {world}={found.world} ranks, which count from 0: correct them"
            )
        # srun sets this one for its tasks; the batch script itself has the others all the same.
        alone = "SLURM_JOB_ID" in environment and "SLURM_STEP_NUM_TASKS" not in environment
        if rank == "SLURM_PROCID" and found.world > 1 and alone:
            raise UserError(
                f"slurm's job has {found.world} tasks, and nothing started them: put srun before the command"
            )
        return found
    return Share()


def wait_for_others(share: Share, poll: float = 0.2) -> bool:
    """Under torchrun, return when every rank has come here: it stops all others when one ends with an error.

    Their meeting point is the store in torchrun's own process, which outlives any rank; if that is gone, so is what
    would stop the others. Other launchers let ranks end by themselves.

    Returns:
        whether all ranks are known to have come here.
    """
    if share.world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    here = "ucdir_plugin/done/{}"
    try:
        store, _, _ = next(dist.rendezvous("env://", share.rank, share.world, timeout=datetime.timedelta(minutes=1)))
        store.set(here.format(share.rank), "")
        while not store.check([here.format(rank) for rank in range(share.world)]):
            time.sleep(poll)  # the store's own wait does not listen to signals
    except dist.DistError:
        return False
    return True
