"""Training and testing of any registered BasicSR model.

BasicSR's own loop replays the first batches after a resume; in this one everything random is a function of the seed and
the iteration, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import time
from typing import Any, Iterator, Optional

import torch

from ucdir_plugin import compat
from ucdir_plugin.compat import AvgTimer, CPUPrefetcher, CUDAPrefetcher, MessageLogger, init_tb_loggers
from ucdir_plugin.data.loader import PATIENCE, EndlessSampler, close, training_loader
from ucdir_plugin.training.setup import (
    Engine,
    Saved,
    begin_test,
    begin_training,
    build,
    first_step,
    make_folders,
    one_line,
    seed_everything,
)
from ucdir_plugin.training.stops import FiniteLosses, Stop
from ucdir_plugin.training.testing import test_sets, validate_set, weights_of
from ucdir_plugin.utils.checkpoints import not_finite
from ucdir_plugin.utils.errors import Stopped, UserError
from ucdir_plugin.utils.protocols import HasNetwork
from ucdir_plugin.utils.training_states import (
    check_optimizers,
    find_resume_state,
    schedule_of_options,
)


def find_saved(opt: dict) -> Optional[Saved]:
    """The training state to go on from."""
    state, folder = find_resume_state(opt), opt["path"]["training_states"]
    return Saved(state["iter"], state, folder, f"at iteration {state['iter']}") if state else None


def load_saved(model: Any, saved: Saved) -> list[str]:
    """Put a training state into a model; the options' schedule of learning rates is kept."""
    state = saved.content
    check_optimizers(state, model.optimizers)
    with one_line("resuming"):
        state["schedulers"], rescheduled = schedule_of_options(state["schedulers"], model.schedulers)
        model.resume_training(state)
    model.best_metric_results = state.get("best_metric_results", {})
    other = ", ".join(rescheduled)
    return [f"learning rates go on as the options say: other {other} than before"] if rescheduled else []


BASICSR = Engine(find_saved, lambda opt: build("model", compat.build_model, opt), load_saved, make_folders)


def train(opt: dict, args: argparse.Namespace) -> int:
    """Train as complete options say; returns the exit code (128 + signal after a stop that was asked for).

    Raises:
        UserError: naming what is wrong.
    """
    seed, total = opt["manual_seed"], opt["train"]["total_iter"]
    train_set, val_sets, model, saved_state, logger = begin_training(opt, args.opt, BASICSR)
    start = saved_state.iteration if saved_state else 0
    teacher = (opt["train"].get("teacher") or {}).get("model")
    logger.info(f"weights: {opt['path'].get('pretrain_network_g') or teacher or 'random'}")
    if isinstance(model, HasNetwork):
        model.print_network(model.net_g)

    data_opt = opt["datasets"]["train"]
    gpus = 1 if opt["dist"] else max(1, opt["num_gpu"])  # several without processes: DataParallel
    batch = data_opt["batch_size_per_gpu"] * gpus
    sampler = EndlessSampler(len(train_set), batch, opt["rank"], opt["world_size"], seed, start)
    workers = data_opt["num_worker_per_gpu"] * gpus
    loader = training_loader(train_set, {**data_opt, "num_worker_per_gpu": workers}, sampler)
    epoch_iters = max(1, math.ceil(len(train_set) / (batch * opt["world_size"])))
    logger.info(f"{len(train_set)} training images, {total} iterations of {batch} x {opt['world_size']} samples")
    tb_logger = init_tb_loggers(opt)
    messages = MessageLogger(opt, start, tb_logger)
    on_cuda = data_opt.get("prefetch_mode") == "cuda" and model.device.type == "cuda"
    prefetcher = CUDAPrefetcher(loader, opt) if on_cuda else CPUPrefetcher(loader)
    stop, losses = Stop(), FiniteLosses()
    iteration = saved = start

    def save(latest: bool = False) -> None:
        nonlocal saved
        saved = iteration  # or cannot be
        if losses.bad:
            logger.warning(f"iteration {iteration} is not saved: its loss is not finite")
            return
        for name, net in vars(model).items():
            is_network = name.startswith("net_") and isinstance(net, torch.nn.Module)
            damaged = not_finite(model.get_bare_model(net)) if is_network else None
            if damaged is not None:
                raise UserError(
                    f"training stopped at iteration {iteration}, which is not saved: {damaged} of {name} holds NaN or"
                    " infinite values; the last checkpoint before is kept. Lower the learning rate, or check the data"
                )
        model.save(*((-1, -1) if latest else (iteration // epoch_iters, iteration)))

    @contextlib.contextmanager
    def between_steps() -> Iterator[None]:
        """What goes wrong here leaves the weights whole: it is raised when they are saved."""
        try:
            yield
        except Exception:
            # One rank alone cannot save what needs all of them.
            if iteration > saved and not opt["dist"]:
                save()
                logger.info(f"saved iteration {iteration}; go on with --auto_resume")
            raise

    def validation() -> None:
        with between_steps():
            for val_set in val_sets:
                validate_set(opt, model, val_set, iteration, tb_logger, stop)

    val_freq = opt["val"]["val_freq"]
    data_timer, iter_timer = AvgTimer(), AvgTimer()
    started = time.time()
    try:
        if 0 < start < total and start % val_freq == 0:
            validation()  # a stop between saving and validating may have lost it
        while iteration < total:
            # Ranks that wait for each other in a step can leave only after it.
            with between_steps(), contextlib.nullcontext() if opt["dist"] else stop.at_once(PATIENCE):
                data = prefetcher.next()
            data_timer.record()
            step = iteration + 1
            model.update_learning_rate(step, opt["train"].get("warmup_iter", -1))
            seed_everything(seed, "step", step, opt["rank"])
            with first_step(step == start + 1):
                model.feed_data(data)
                model.optimize_parameters(step)
            losses.look(model, step)
            iteration = step
            iter_timer.record()
            if iteration == start + 1:
                messages.reset_start_time()
            with between_steps():
                if iteration % opt["logger"]["print_freq"] == 0:
                    line = {"epoch": iteration // epoch_iters, "iter": iteration}
                    line.update(lrs=model.get_current_learning_rate())
                    line.update(time=iter_timer.get_avg_time(), data_time=data_timer.get_avg_time())
                    line.update(model.get_current_log())
                    messages(line)
                if iteration % opt["logger"]["save_checkpoint_freq"] == 0 or iteration == total:
                    save()
                stop.agree(opt, model.device)
            if iteration % val_freq == 0 and iteration < total:
                validation()
            data_timer.start()
            iter_timer.start()

        seconds = datetime.timedelta(seconds=int(time.time() - started))
        logger.info(f"end of training at iteration {iteration} after {seconds}; saving the latest model")
        save(latest=True)
        validation()
    except Stopped:
        if iteration > saved:
            save()
        done = f"stopped and saved at iteration {iteration}; go on with --auto_resume"
        logger.info(f"signal {stop.signal}: {done if iteration else 'stopped before the first iteration'}")
        return 128 + stop.signal
    finally:
        close(prefetcher.loader)
        if tb_logger:
            tb_logger.close()
    return 0


def test(opt: dict, args: argparse.Namespace) -> int:
    """Test on the option file's val and test datasets, write pictures and tables; returns the exit code.

    Raises:
        UserError: naming what is wrong.
    """
    model, sets, logger = begin_test(opt, args.force_yml or [], BASICSR)
    logger.info(f"weights: {weights_of(opt, model)}, key {opt['path'].get('param_key_g')}")
    return test_sets(opt, model, sets)
