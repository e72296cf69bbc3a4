"""Training and testing of any registered BasicSR model: what tools/train.py and tools/test.py call.

BasicSR's own loop replays the first batches after a resume; in this one everything random is a function of the seed and
the iteration, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import math
import os
import re
import sys
import time
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher
from basicsr.models import build_model
from basicsr.train import init_tb_loggers
from basicsr.utils import AvgTimer, MessageLogger

from ucdir_plugin.data.loader import PATIENCE, EndlessSampler, close, training_loader
from ucdir_plugin.options.reading import option_text
from ucdir_plugin.training.setup import (
    agreed_start,
    build,
    build_sets,
    first_step,
    make_folders,
    one_line,
    seed_everything,
    setup,
    start_log,
)
from ucdir_plugin.training.stops import FiniteLosses, Stop, is_of_lost_rank, is_of_lost_worker
from ucdir_plugin.training.testing import test_sets, validate_set, weights_of
from ucdir_plugin.utils import files
from ucdir_plugin.utils.checkpoints import not_finite
from ucdir_plugin.utils.errors import Stopped, UserError, WriteError
from ucdir_plugin.utils.training_states import (
    check_optimizers,
    find_resume_state,
    remove_leftovers,
    schedule_of_options,
)
from ucdir_plugin.zoo.model_files import find_weights


def _mmengine() -> Any:
    from ucdir_plugin.mm import runner as other  # which takes a while to import

    return other


def _tells_of_losses(function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """What :func:`is_of_lost_rank` knows becomes one line; so does the loss of a loader's worker, or of the disk."""

    @functools.wraps(function)
    def told(args: argparse.Namespace) -> int:
        try:
            return function(args)
        except WriteError as err:
            again = "what is saved is kept: once it can be written, go on with --auto_resume"
            if function.__name__ == "test":
                again = "what is restored is kept: run the same command again"
            raise UserError(f"{err}; {again}") from err
        except RuntimeError as err:
            if is_of_lost_worker(err):
                raise UserError(
                    f"a process that reads data was killed ({str(err).splitlines()[0]}), perhaps for lack of memory: go"
                    " on with --auto_resume, and fewer num_worker_per_gpu if it comes again"
                ) from err
            if not is_of_lost_rank(err):
                raise
            again = "start all ranks again with --auto_resume, from the last checkpoint"
            if function.__name__ == "test":
                again = "start all ranks again: what is restored is kept"
            text = str(err)
            if "timed out" in text.lower() or "timeout" in text.lower():
                again += " (one that is only slow needs a larger dist_params: timeout, in seconds)"
            reason = re.sub(r"^\[[^]]*\] ", "", text.splitlines()[0]).split(". ")[0]  # without gloo's file and advice
            raise UserError(
                f"rank {dist.get_rank()} has lost another rank, which ended or does not answer ({reason}):"
                f" its own output or the launcher says why; {again}"
            ) from err

    return told


@_tells_of_losses
def train(args: argparse.Namespace) -> int:
    """Train as the option file says; returns the exit code (128 + signal after a stop that was asked for)."""
    if args.opt.endswith(".py"):
        return _mmengine().run_config(args, is_train=True)
    opt = setup(args, is_train=True)
    if opt["engine"] == "mmengine":
        return _mmengine().train(opt, args)
    rank_0, seed, total = opt["rank"] == 0, opt["manual_seed"], opt["train"]["total_iter"]
    text = option_text(args.opt)
    # Whatever can be wrong with data, weights and networks shows before any folder is made or moved away.
    (train_set,), val_sets = build_sets(opt, ("train",)), build_sets(opt, ("val",))
    resume = find_resume_state(opt)
    start = agreed_start(resume["iter"] if resume else 0, opt["path"]["training_states"], opt)
    seed_everything(seed, "init")
    model = build("model", build_model, opt)
    if resume:
        check_optimizers(resume, model.optimizers)
        with one_line("resuming"):
            resume["schedulers"], rescheduled = schedule_of_options(resume["schedulers"], model.schedulers)
            model.resume_training(resume)
        model.best_metric_results = resume.get("best_metric_results", {})
    if opt["dist"]:
        dist.barrier()  # all have looked before rank 0 moves an earlier experiment away
    root = opt["path"]["experiments_root"]
    if not resume:
        make_folders(opt)
    if rank_0:
        remove_leftovers(root)
        state = f"resuming {opt['name']} at iteration {start}" if resume else f"starting {opt['name']} from scratch"
        print(state, flush=True)
        head = f"# {time.asctime()}: {' '.join(sys.argv)}\n"
        files.write_text(head + text, os.path.join(root, os.path.basename(args.opt)))
    logger = start_log(opt, "train")
    if resume and rescheduled:
        logger.info(f"learning rates go on as the options say: other {', '.join(rescheduled)} than before")
    logger.info(f"weights: {opt['path'].get('pretrain_network_g') or 'random'}")
    if hasattr(model, "net_g"):
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


@_tells_of_losses
def test(args: argparse.Namespace) -> int:
    """Test on the option file's val and test datasets, write pictures and tables; returns the exit code."""
    if args.opt.endswith(".py"):
        return _mmengine().run_config(args, is_train=False)
    opt = setup(args, is_train=False)
    if opt["engine"] == "mmengine":
        return _mmengine().test(opt, args)
    if "network_g" in opt:
        find_weights(opt, args.force_yml or [])
    sets = build_sets(opt, ("val", "test"))
    if not sets:
        raise UserError("option datasets: there is no val or test dataset")
    model = build("model", build_model, opt)
    if opt["dist"]:
        dist.barrier()
    make_folders(opt)
    if opt["dist"]:
        dist.barrier()
    logger = start_log(opt, "test")
    logger.info(f"weights: {weights_of(opt, model)}, key {opt['path'].get('param_key_g')}")
    return test_sets(opt, model, sets)
