"""Training and testing of any registered BasicSR model: what tools/train.py and tools/test.py call.

BasicSR's own loop replays the first batches after a resume; in this one everything random is a function of the seed and
the iteration, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from typing import Any, Callable, Iterator, List, Optional

import torch
import torch.distributed as dist
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher
from basicsr.models import build_model
from basicsr.train import init_tb_loggers
from basicsr.utils import AvgTimer, MessageLogger, get_root_logger, get_time_str, make_exp_dirs, mkdir_and_rename
from basicsr.utils.dist_util import get_dist_info
from basicsr.utils.options import dict2str

import ucdir_plugin
from ucdir_plugin import compat, memory, report, report_html
from ucdir_plugin.checkpoint import check_optimizers, find_resume_state, remove_leftovers, schedule_of_options
from ucdir_plugin.data.loader import PATIENCE, EndlessSampler, close, seed_cpu, training_loader
from ucdir_plugin.diffusion.noise import key_to_seed
from ucdir_plugin.errors import Stopped, UserError, WriteError, free_space
from ucdir_plugin.evaluation import for_basicsr_loop
from ucdir_plugin.options import load_options, option_text, share_batch
from ucdir_plugin.restorer import versions
from ucdir_plugin.sizing import check_options_fit
from ucdir_plugin.validation import bare_networks, handles, validate
from ucdir_plugin.weights import find_weights, not_finite, sha256_of


def parse_args(description: str, argv: Optional[List[str]] = None) -> argparse.Namespace:
    """BasicSR's command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-opt", required=True, help="option file (YAML)")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm"], default="none", help="job launcher")
    parser.add_argument("--auto_resume", action="store_true", help="go on from the newest readable checkpoint")
    parser.add_argument("--debug", action="store_true", help="log, save and validate every few iterations")
    parser.add_argument(
        "--force_yml", nargs="+", action="extend", metavar="KEY:SUBKEY=VALUE", help="override options; values are YAML"
    )
    parser.add_argument("--weights-dir", metavar="DIR", help="where metrics' weights are looked for first")
    parser.add_argument("--trust-config", action="store_true", help="allow MMEngine's .py files and custom_imports")
    parser.add_argument("--download", action="store_true", help="get metrics' weights that are not there")
    return parser.parse_args(argv)


def setup(args: argparse.Namespace, is_train: bool) -> dict:
    """Options, distributed processes, paths below the working directory, seeds."""
    opt = load_options(args.opt, args.force_yml, is_train, args.trust_config)
    if args.weights_dir:
        opt["val"]["weights_dir"] = args.weights_dir
    opt["val"]["download"] = args.download or opt["val"]["download"]
    opt["dist"] = args.launcher != "none"
    if not opt["dist"] and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several processes were started (WORLD_SIZE is set): add --launcher pytorch")
    available = torch.cuda.device_count()
    given = opt["num_gpu"]
    opt["num_gpu"] = available if given == "auto" else given
    if opt["engine"] == "mmengine" and opt["num_gpu"] == 0 < available:
        raise UserError(
            "option num_gpu: 0: MMEngine takes the GPU that it finds; hide it: CUDA_VISIBLE_DEVICES= python ..."
        )
    if opt["engine"] == "mmengine" and not opt["dist"] and opt["num_gpu"] > 1:
        if given != "auto":
            raise UserError(
                f"option num_gpu: {given}: a process of MMEngine uses one GPU; start as many by torchrun, with"
                " --launcher pytorch, or take num_gpu: auto"
            )
        opt["num_gpu"] = 1
    if opt["num_gpu"] > available:
        raise UserError(f"option num_gpu: {opt['num_gpu']} asked for, {available} found; use auto, or 0 for the CPU")
    if opt["dist"] and not dist.is_initialized():
        cpu = {"backend": "gloo"} if opt["num_gpu"] == 0 else {}
        compat.init_dist(args.launcher, **{**opt["dist_params"], **cpu})
    opt["rank"], opt["world_size"] = get_dist_info()
    opt["auto_resume"], opt["is_train"] = args.auto_resume, is_train
    if args.debug and not opt["name"].startswith("debug"):
        opt["name"] = f"debug_{opt['name']}"
    if is_train:
        share_batch(opt["datasets"]["train"], opt["world_size"] if opt["dist"] else max(1, opt["num_gpu"]))
    for phase, dataset in opt["datasets"].items():
        dataset.update(phase=phase.split("_")[0], scale=opt["scale"])
        for key in ("dataroot_gt", "dataroot_lq", "meta_info_file", "condition_file"):
            if dataset.get(key):
                dataset[key] = os.path.expanduser(dataset[key])
    path = opt["path"]
    for key, value in path.items():
        if isinstance(value, str):
            path[key] = os.path.expanduser(value)
    check_options_fit(opt, is_train)
    opt["root_path"] = os.getcwd()
    root = os.path.join(opt["root_path"], "experiments" if is_train else "results", opt["name"])
    path.update(log=root, visualization=os.path.join(root, "visualization"))
    if is_train:
        path.update(
            experiments_root=root,
            models=os.path.join(root, "models"),
            training_states=os.path.join(root, "training_states"),
        )
        if "debug" in opt["name"]:
            opt["val"]["val_freq"] = opt["logger"]["save_checkpoint_freq"] = 8
            opt["logger"]["print_freq"] = 1
    else:
        path["results_root"] = root
    if opt["rank"] == 0:
        get_root_logger().setLevel(logging.INFO)
    torch.backends.cudnn.benchmark = True
    memory.keep_freed_memory()
    seed_everything(opt["manual_seed"], "start")
    return opt


def seed_everything(*key: Any) -> None:
    """Seed python, numpy and torch on every device from a key."""
    seed_cpu(*key)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(key_to_seed(*key))


class LogFile(logging.FileHandler):
    """One that says once that it cannot be written, where logging prints a traceback for each line."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        err = sys.exc_info()[1]
        if not isinstance(err, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            print(
                f"warning: the log {self.baseFilename} cannot be written: {err.strerror}"
                f" ({free_space(self.baseFilename)}); training goes on",
                file=sys.stderr,
                flush=True,
            )


def start_log(opt: dict, kind: str) -> logging.Logger:
    """BasicSR's logger with a file in the run's folder (its building functions have created it without one by now)."""
    logger = get_root_logger()
    if opt["rank"] == 0:
        for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:  # of an earlier run
            logger.removeHandler(handler)
            handler.close()
        handler = LogFile(os.path.join(opt["path"]["log"], f"{kind}_{opt['name']}_{get_time_str()}.log"))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)
    logger.info(f"ucdir-plugin {ucdir_plugin.__version__}, torch {torch.__version__}, world size {opt['world_size']}")
    logger.info(dict2str(opt))
    return logger


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """What is raised about the user's options, by code that does not check them, becomes one line; not a loss.

    Raises:
        UserError: with ``what`` in front.
    """
    kinds = (AssertionError, ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError)
    try:
        yield
    except (*kinds, TypeError, ValueError) as err:
        if is_of_lost_rank(err) or is_of_lost_worker(err):
            raise
        raise UserError(f"{what}: {type(err).__name__}: {err}") from err


def build(what: str, builder: Any, opt: dict) -> Any:
    """Call a builder of BasicSR.

    Raises:
        UserError: as :func:`one_line`.
    """
    with one_line(what):
        return builder(opt)


def first_step(first: bool) -> contextlib.AbstractContextManager:
    """Around a training step: of the first, what is raised is about options that do not go together."""
    return one_line("the first training step failed") if first else contextlib.nullcontext()


def build_sets(opt: dict, phases: tuple[str, ...]) -> list[Any]:
    sets = {p: d for p, d in opt["datasets"].items() if d["phase"] in phases}
    return [build(f"option datasets:{p} ({d['type']})", build_dataset, d) for p, d in sets.items()]


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


def agreed_start(start: int, folder: str, opt: dict) -> int:
    """The iteration that all ranks resume at.

    Args:
        start: that this rank found in ``folder``, or 0.

    Raises:
        UserError: if they found different ones.
    """
    if opt["dist"]:
        first = [start]
        dist.broadcast_object_list(first)
        if first[0] != start:
            raise UserError(
                f"rank {opt['rank']} finds iteration {start} in {folder}, rank 0 iteration {first[0]}:"
                " all machines need the same folder (a shared disk)"
            )
    return start


class FiniteLosses:
    """Stops models that do not look at their losses themselves (BasicSR's) once they are lost."""

    def __init__(self, limit: int = 10):
        self.limit, self.bad = limit, 0

    def look(self, model: Any, iteration: int) -> None:
        """
        Raises:
            UserError: after ``limit`` iterations in a row with a logged loss that is not finite.
        """
        losses = getattr(model, "log_dict", {}).values()
        self.bad = self.bad + 1 if any(not math.isfinite(v) for v in losses) else 0
        if self.bad >= self.limit:
            raise UserError(
                f"training stopped at iteration {iteration}: {self.bad} steps in a row without a finite loss;"
                " the last checkpoint before them is kept. Lower the learning rate, or check the data"
            )


def _mmengine() -> Any:
    from ucdir_plugin.mm import engine as other  # which takes a while to import

    return other


def is_of_lost_rank(err: Exception) -> bool:
    """Whether it is what a collective raises where another rank has ended, or keeps the others waiting."""
    return dist.is_initialized() and (isinstance(err, dist.DistError) or "gloo" in str(err))


def is_of_lost_worker(err: Exception) -> bool:
    """Whether it is what torch raises, wherever the process is, once a worker of its loader has been killed."""
    return isinstance(err, RuntimeError) and str(err).startswith("DataLoader worker")


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


def make_folders(opt: dict) -> None:
    """BasicSR's; an older folder is renamed after the second, which another may have been renamed after already."""
    roots = [opt["path"]["experiments_root" if opt["is_train"] else "results_root"]]
    if opt["is_train"] and opt["logger"]["use_tb_logger"]:
        roots.append(os.path.join(opt["root_path"], "tb_logger", opt["name"]))
    while opt["rank"] == 0 and any(os.path.exists(f"{root}_archived_{get_time_str()}") for root in roots):
        time.sleep(0.1)
    make_exp_dirs(opt)
    for root in roots[1:] if opt["rank"] == 0 else ():
        mkdir_and_rename(root)


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
        report.write_text(head + text, os.path.join(root, os.path.basename(args.opt)))
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


def own_validation(
    model: Any, dataset: Any, current_iter: Any, tb_logger: Any, save_img: bool, stop: Optional[Stop] = None
) -> None:
    """Validation of a model that has its own (video, padded windows): on rank 0, as in BasicSR."""
    opt = model.opt
    opt["val"]["metrics"] = for_basicsr_loop(opt["val"].get("metrics"), opt["val"].get("weights_dir"))
    loader = build_dataloader(dataset, {**dataset.opt, "persistent_workers": False}, opt["num_gpu"], opt["dist"])
    # Of several ranks nobody knows here where they wait for each other.
    with bare_networks(model), stop.at_once() if stop and not opt["dist"] else contextlib.nullcontext():
        model.validation(loader, current_iter, tb_logger, save_img)
    if stop:
        stop.agree(opt, model.device)


_BESIDE = {
    "path",
    "rank",
    "world_size",
    "dist",
    "dist_params",
    "num_gpu",
    "auto_resume",
    "root_path",
    "logger",
    "datasets",
}
"""Options that restored images do not depend on, or that are looked at apart."""


def _decides(opt: dict, model: Any, dataset: dict, weights: Optional[str]) -> str:
    """All that decides what comes out of an image, in short; of its files, see :func:`validate`.

    Args:
        weights: their SHA-256.
    """
    files = [os.stat(v) for v in dataset.values() if isinstance(v, str) and os.path.isfile(v)]
    used = [
        {key: value for key, value in opt.items() if key not in {*_BESIDE, "val"}},
        opt["val"].get("sampling"),
        {key: value for key, value in opt["path"].items() if key.startswith(("param_key", "strict_load"))},
        dataset,
        [(file.st_size, file.st_mtime_ns) for file in files],
        weights,
        model.restorer.record_settings() if hasattr(model, "restorer") else None,
        versions(),
    ]
    return hashlib.sha256(json.dumps(used, sort_keys=True, default=str).encode()).hexdigest()


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


def weights_of(opt: dict, model: Any) -> Optional[str]:
    """The file that a model's weights are from."""
    return getattr(model, "weights", opt["path"]["pretrain_network_g"])


def validate_set(
    opt: dict, model: Any, val_set: Any, iteration: int, tb_logger: Any, stop: Optional[Stop]
) -> Optional[report.Results]:
    """Validate on a data set in training and write its table; None for a model with a validation of its own.

    Raises:
        Stopped: on all ranks, if one was asked to stop.
    """
    name, save_img = val_set.opt["name"], opt["val"]["save_img"]
    if not handles(model):
        own_validation(model, val_set, iteration, tb_logger, save_img, stop)
        return None
    results = validate(model, val_set, iteration, tb_logger, save_img, stop=stop)
    if opt["rank"] == 0:
        about = {"name": opt["name"], "dataset": name, "iteration": iteration}
        report.write_tables(results, os.path.join(opt["path"]["experiments_root"], f"metrics_{name}"), about)
    return results


def test_sets(opt: dict, model: Any, sets: list[Any]) -> int:
    """Restore and measure data sets, write pictures and tables; returns the exit code.

    Raises:
        UserError: if no image of a set could be restored.
    """
    weights, failed, lost = weights_of(opt, model), 0, []
    digest = sha256_of(weights) if weights else None
    # Outside of results/NAME, which the next run moves away.
    unfinished = os.path.join(os.path.dirname(opt["path"]["results_root"]), f".unfinished_{opt['name']}")
    for test_set in sets:
        name = test_set.opt["name"]
        if not handles(model):
            own_validation(model, test_set, opt["name"], None, opt["val"]["save_img"])
            continue
        root = opt["path"]["results_root"]
        pictures = report_html.Store(os.path.join(unfinished, name))
        settings = _decides(opt, model, test_set.opt, digest)
        results = validate(model, test_set, opt["name"], None, opt["val"]["save_img"], pictures, settings)
        failed += len(results.failed)
        if not results.rows:
            lost.append(f"none of the {len(test_set)} images of {name}")
        elif opt["rank"] == 0:
            stem, page = os.path.join(root, f"metrics_{name}"), os.path.join(root, f"report_{name}.html")
            about = {"name": opt["name"], "dataset": name, "weights": weights, "weights_sha256": digest}
            report.write_tables(results, stem, about)
            report_html.write_report(results, page, about, pictures.part)
            print(report.markdown_table(results))
            print(f"weights: {weights}")
            print(f"table: {stem}.md .csv .json; report: {page}; pictures: {opt['path']['visualization']}", flush=True)
    if opt["rank"] == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    if lost:
        raise UserError(f"{' and '.join(lost)} could be restored: the log says why")
    return 1 if failed else 0
