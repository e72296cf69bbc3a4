"""Hooks of MMEngine: averages, seeds, learning rates, losses by noise level, pictures, plain checkpoints, stops."""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence

import numpy as np
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ucdir_plugin import compat
from ucdir_plugin.compat import tensor2img
from ucdir_plugin.mm.optim import DiffusionOptimWrapper
from ucdir_plugin.registry import HOOKS
from ucdir_plugin.training.setup import seed_everything
from ucdir_plugin.training.steps import LossSums, build_schedulers, update_average
from ucdir_plugin.training.stops import Stop
from ucdir_plugin.utils import image_writing
from ucdir_plugin.utils.training_states import schedule_of_options


def bare(runner: Any) -> Any:
    """The runner's model without its parallel wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _stepped(runner: Any) -> bool:
    """Whether this iteration changed the weights; MMEngine's own wrappers do not say."""
    return runner.optim_wrapper.stepped if isinstance(runner.optim_wrapper, DiffusionOptimWrapper) else True


@HOOKS.register_module()
class SeedHook(Hook):
    """Makes everything random in an iteration (dropout) a function of the seed, the iteration and the rank."""

    priority = "HIGHEST"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(self.seed, "step", runner.iter + 1, runner.rank)


@HOOKS.register_module()
class LearningRateHook(Hook):
    """``train: scheduler`` and ``warmup_iter`` of an option file, as under BasicSR."""

    priority = "HIGHEST"

    def __init__(self, scheduler: Optional[Dict[str, Any]] = None, warmup_iter: int = -1):
        self.scheduler, self.warmup_iter, self._saved = scheduler, warmup_iter, None

    def before_train(self, runner: Any) -> None:
        self._optimizers = [runner.optim_wrapper.optimizer]
        groups = runner.optim_wrapper.optimizer.param_groups
        resumed = [group["lr"] for group in groups]
        self._schedulers = build_schedulers(self.scheduler, self._optimizers)
        if self._saved is not None:
            states, changed = schedule_of_options(self._saved, self._schedulers)
            if changed:
                runner.logger.info(f"learning rates go on as the options say: other {', '.join(changed)} than before")
            for scheduler, state in zip(self._schedulers, states):
                scheduler.load_state_dict(state)
            for group, lr in zip(groups, resumed):
                group["lr"] = lr  # a new scheduler sets the first rate

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        compat.set_learning_rates(self._optimizers, self._schedulers, runner.iter + 1, self.warmup_iter)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["learning_rate"] = [s.state_dict() for s in self._schedulers]

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        self._saved = checkpoint.get("learning_rate") if runner._resume else None


@HOOKS.register_module()
class AverageHook(Hook):
    """The model's ``net_g_ema`` follows ``net_g``: a copy until iteration ``start``, then by ``decay``, ramped up."""

    priority = "ABOVE_NORMAL"

    def __init__(self, decay: float, start: int = 0):
        self.decay, self.start = decay, start

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if _stepped(runner):
            model = bare(runner)
            update_average(model.net_g_ema, model.net_g, runner.iter + 1, self.start, self.decay)


@HOOKS.register_module()
class NoiseBandsHook(Hook):
    """Losses, and errors by noise level, to MMEngine's log: means over ``interval`` iterations and all ranks."""

    priority = "ABOVE_NORMAL"

    def __init__(self, interval: int = 100):
        self.interval, self._saved, self._sums = interval, {}, None

    def before_train(self, runner: Any) -> None:
        self._sums = LossSums(bare(runner).task.band_log)
        self._sums.load_state_dict(self._saved, runner.rank, bare(runner).task.device)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = bare(runner)
        for seen in model.seen if _stepped(runner) else ():
            self._sums.add(*seen)
        model.seen.clear()
        if self.every_n_train_iters(runner, self.interval):
            for name, value in self._sums.read(runner.distributed).items():
                runner.message_hub.update_scalar(f"train/{name}", value)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["loss_sums"] = self._sums.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        self._saved = checkpoint.get("loss_sums", {}) if runner._resume else {}


@HOOKS.register_module()
class PicturesHook(Hook):
    """Input, initial prediction, result and truth of the first images of a validation, side by side, to the visualizer.

    Args:
        count: so many images.
    """

    def __init__(self, count: int = 4):
        self.count = count

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Optional[Sequence[dict]] = None
    ) -> None:
        for sample in outputs or () if batch_idx < self.count else ():
            images = [tensor2img([sample[n]]) for n in ("lq", "initial", "output", "gt") if sample.get(n) is not None]
            if all(image.shape == images[-1].shape for image in images):
                strip = np.ascontiguousarray(image_writing.side_by_side(images)[..., ::-1])
                runner.visualizer.add_image(sample["key"].replace("/", "_"), strip, step=runner.iter)


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Keeps all but tensors and plain values out of checkpoints, so that they can be read without running code.

    What is left out are MMEngine's histories of logged numbers: its smoothed log starts anew after a resume.
    """

    priority = "LOWEST"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        hub = checkpoint.get("message_hub")
        if hub:
            plain = (str, int, float, bool)  # by type: numpy's floats are floats too
            info = {k: v for k, v in hub["runtime_info"].items() if type(v) in plain and k != "cfg"}
            kept = {k: v for k, v in hub["resumed_keys"].items() if k in info}
            checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": info, "resumed_keys": kept}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        # Runner.resume would run it as Python.
        checkpoint.get("meta", {}).pop("config", None)


@HOOKS.register_module()
class StopHook(Hook):
    """SIGTERM (a cluster's) and Ctrl-C: finish the iteration, save, leave.

    Attributes:
        stop: its ``signal`` is the one that came, or 0.
    """

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self.stop = Stop()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.stop.asked({"dist": runner.distributed}, bare(runner).task.device):
            self.leave(runner, runner.iter + 1)

    def leave(self, runner: Any, iteration: int) -> None:
        """Save, if the checkpoint of this iteration is not there, and end the training."""
        save(runner, iteration)
        runner.logger.info(
            f"signal {self.stop.signal}: stopped and saved at iteration {iteration}; go on with --auto_resume"
        )
        runner.train_loop.stop_training = True


def stop_hook(runner: Any) -> Optional[StopHook]:
    """The hook that stops a training; None in a configuration of MMEngine's own without one."""
    return next((hook for hook in runner.hooks if isinstance(hook, StopHook)), None)


def save(runner: Any, iteration: int) -> None:
    """MMEngine's checkpoint of the last iteration, whether that has been counted already or not; on all ranks."""
    runner.save_checkpoint(runner.work_dir, f"iter_{iteration}.pth", by_epoch=iteration == runner.iter)
