"""Training states that survive a kill at any moment, and finding the newest one that can be read.

A run's files are those of BasicSR: ``models/net_g_ITER.pth`` and ``training_states/ITER.state``. The state is written
last, so where it exists and can be read, its networks do too.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ucdir_plugin.utils.checkpoints import read_checkpoint
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import atomic_write
from ucdir_plugin.utils.protocols import KeepsExtraState


def atomic_save(obj: Any, path: str | os.PathLike) -> None:
    """``torch.save`` by :func:`ucdir_plugin.utils.files.atomic_write`: readers see the old file or the new one.

    Raises:
        UserError: if it cannot be written; names the path and the free space.
    """
    with atomic_write(path) as file:
        torch.save(obj, file)


def remove_leftovers(root: str) -> None:
    """Delete what a killed run left half-written in its folder and below: checkpoints, pictures, tables."""
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(".tmp"):
                os.remove(os.path.join(folder, name))


def to_cpu(obj: Any) -> Any:
    """Copy a nested structure with its tensors on the CPU."""
    if isinstance(obj, torch.Tensor):
        return obj.detach().cpu()
    if isinstance(obj, dict):
        return {k: to_cpu(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return type(obj)(to_cpu(v) for v in obj)
    return obj


def save_network(self, net, net_label: str, current_iter: int, param_key="params") -> None:
    """``BaseModel.save_network`` of BasicSR, atomic, and an error where upstream ignores a failed save (a method)."""
    nets = net if isinstance(net, list) else [net]
    keys = param_key if isinstance(param_key, list) else [param_key]
    name = "latest" if current_iter == -1 else current_iter
    content = {key: to_cpu(dict(self.get_bare_model(n).state_dict())) for n, key in zip(nets, keys)}
    atomic_save(content, os.path.join(self.opt["path"]["models"], f"{net_label}_{name}.pth"))


def save_training_state(self, epoch: int, current_iter: int) -> None:
    """``BaseModel.save_training_state`` of BasicSR, atomic, with what validation has found so far (a method)."""
    if current_iter == -1:
        return
    state = {
        "epoch": epoch,
        "iter": current_iter,
        "optimizers": [to_cpu(o.state_dict()) for o in self.optimizers],
        "optimizer_types": [type(o).__name__ for o in self.optimizers],
        "schedulers": [s.state_dict() for s in self.schedulers],
        "best_metric_results": getattr(self, "best_metric_results", {}),
        "extra": self.extra_state() if isinstance(self, KeepsExtraState) else {},
    }
    atomic_save(state, os.path.join(self.opt["path"]["training_states"], f"{current_iter}.state"))


def check_optimizers(state: dict, optimizers: list[torch.optim.Optimizer]) -> None:
    """Compare a training state's optimizers with these.

    Raises:
        UserError: if a training state belongs to other optimizers than these.
    """
    saved, own = state.get("optimizer_types"), [type(o).__name__ for o in optimizers]
    if saved is not None and saved != own:
        raise UserError(f"the training state is of optimizer {', '.join(saved)}, the options ask for {', '.join(own)}")


_PROGRESS = {"optimizer", "base_lrs", "last_epoch"}


def schedule_of_options(saved: list[dict], schedulers: list) -> tuple[list[dict], list[str]]:
    """Saved states of schedulers, with the schedule (milestones, periods ...) that the options gave ``schedulers``.

    Upstream, and MMEngine, go on with the saved schedule and say nothing where the options have been changed.

    Returns:
        the states to load, and the names of what the options have changed.
    """
    states, changed = [], []
    for state, scheduler in zip(saved, schedulers):
        own = {k: v for k, v in vars(scheduler).items() if not k.startswith("_") and k not in _PROGRESS}
        changed += [key for key, value in own.items() if state.get(key) != value]
        states.append({**state, **own})
    return states + list(saved[len(states) :]), list(dict.fromkeys(changed))


def _network_files(opt: dict, iteration: int) -> dict[str, str]:
    ignored = opt["path"].get("ignore_resume_networks") or ()
    labels = [key for key in opt if key.startswith("network_") and key not in ignored]
    models = opt["path"]["models"]
    return {label: os.path.join(models, f"net_{label[len('network_') :]}_{iteration}.pth") for label in labels}


def find_resume_state(opt: dict) -> dict | None:
    """The training state to go on from, or None; points ``opt['path']`` at its networks.

    With ``opt['auto_resume']`` the newest iteration whose state and networks can all be read; what cannot be read is
    named and passed over. Else ``opt['path']['resume_state']``, if given.

    Raises:
        UserError: if a state that was asked for by name cannot be read, or if there are states but none can.
    """
    path = opt["path"]
    if opt["auto_resume"]:
        folder = path["training_states"]
        found = os.listdir(folder) if os.path.isdir(folder) else []
        stems = [stem for stem, suffix in map(os.path.splitext, found) if suffix == ".state" and stem.isdigit()]
        iterations = sorted(map(int, stems), reverse=True)
        candidates = [os.path.join(folder, f"{i}.state") for i in iterations]
    else:
        candidates = [path["resume_state"]] if path.get("resume_state") else []
    for candidate in candidates:
        try:
            state = read_checkpoint(candidate)
            if not isinstance(state, dict) or "iter" not in state:
                raise UserError(f"{candidate} is no training state of this project")
            networks = _network_files(opt, state["iter"])
            for file in networks.values():
                read_checkpoint(file)
        except UserError as err:
            if not opt["auto_resume"]:
                raise
            if opt.get("rank", 0) == 0:
                print(f"passed over: {err}", flush=True)
            continue
        path["resume_state"] = candidate
        for label, file in networks.items():
            path[f"pretrain_{label}"] = file
        for key in [k for k in path if k.startswith("param_key")]:
            path[key] = "params"
        return state
    if candidates:
        raise UserError(f"no training state in {folder} can be read; move that folder away to start from scratch")
    return None
