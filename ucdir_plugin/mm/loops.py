"""MMEngine's training loop with an exact resume, and its validation by the code that runs under BasicSR."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any, Dict, Iterator

import torch
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from ucdir_plugin.compat import SRModel, get_root_logger
from ucdir_plugin.data.loader import PATIENCE, close
from ucdir_plugin.mm.hooks import save, stop_hook
from ucdir_plugin.mm.metrics import flat
from ucdir_plugin.mm.models import MMBIRDModel
from ucdir_plugin.mm.optim import DiffusionOptimWrapper
from ucdir_plugin.registry import LOOPS
from ucdir_plugin.training import testing
from ucdir_plugin.training.setup import first_step
from ucdir_plugin.training.steps import parts_of
from ucdir_plugin.utils.errors import Stopped, UserError


@LOOPS.register_module()
class KeyedTrainLoop(IterBasedTrainLoop):
    """An IterBasedTrainLoop whose data are a function of the sample number; a resumed one reads none twice.

    Args:
        dataloader: with a :class:`~ucdir_plugin.mm.data.KeyedSampler` of its batch size.
        accumulate: each batch is computed in so many parts, of which the optimizer's wrapper is told.

    Raises:
        UserError: for another sampler or batch size, with which a resumed run would read other samples.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        accumulate: int = 1,
    ):
        super().__init__(runner, dataloader, max_iters, val_begin, val_interval)
        size = getattr(self.dataloader.sampler, "batch", None)
        if size != self.dataloader.batch_size:
            close(self.dataloader_iterator._iterator)
            batch = self.dataloader.batch_size
            raise UserError(f"KeyedTrainLoop needs sampler=dict(type='ucdir_plugin.KeyedSampler', batch={batch})")
        self.accumulate = accumulate

    def run(self) -> Any:
        """Train from the first or the resumed iteration to the last."""
        runner, sampler, start = self.runner, self.dataloader.sampler, self._iter
        if self._iter:
            close(self.dataloader_iterator._iterator)
            sampler.start = self._iter
            self.dataloader_iterator = _InfiniteDataloaderIterator(self.dataloader)
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        validates = runner.val_loop is not None
        hook = stop_hook(runner)
        waits = hook is not None and not runner.distributed  # ranks in a step can leave only after it
        try:
            if validates and 0 < self._iter < self._max_iters and self._iter % self.val_interval == 0:
                self._validate()  # a stop between saving and validating may have lost it
            while self._iter < self._max_iters and not self.stop_training:
                runner.model.train()
                with self._between_steps(), hook.stop.at_once(PATIENCE) if waits else nullcontext():
                    batch = next(self.dataloader_iterator)
                with first_step(self._iter == start):
                    self.run_iter(batch)
                due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
                if validates and due and not self.stop_training:
                    self._validate()
        except Stopped:
            hook.leave(runner, self._iter)
        finally:
            close(self.dataloader_iterator._iterator)
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _validate(self) -> None:
        with self._between_steps():
            self.runner.val_loop.run()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """What goes wrong here leaves the weights whole: it is raised when they are saved."""
        try:
            yield
        except Exception:
            # One rank alone cannot save what needs all of them.
            if self._iter and not self.runner.distributed:
                save(self.runner, self._iter)
            raise

    def run_iter(self, data_batch: Dict[str, Any]) -> None:
        """Take one step, in as many parts as ``accumulate`` says."""
        runner = self.runner
        runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        size = len(data_batch["sample_number"])
        wrapper = runner.optim_wrapper
        part = wrapper.part if isinstance(wrapper, DiffusionOptimWrapper) else None  # MMEngine's count for themselves
        outputs: Dict[str, Any] = {}
        for rows in parts_of(size, self.accumulate):
            share = (rows.stop - rows.start) / size
            if part is not None:
                part(share, rows.stop == size)
            found = runner.model.train_step(_rows(data_batch, rows), optim_wrapper=runner.optim_wrapper)
            for name, value in found.items():
                outputs[name] = outputs.get(name, 0) + value.detach() * share
        runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs)
        self._iter += 1


def _rows(batch: Any, rows: slice) -> Any:
    """Some samples of a collated batch."""
    return {k: _rows(v, rows) for k, v in batch.items()} if isinstance(batch, dict) else batch[rows]


class Restoring(SRModel):
    """A model of mm/ as validation and test of option files take one (:mod:`ucdir_plugin.training.validation`).

    Args:
        runner: its hooks ``PHASE_iter`` are called for each image.
        phase: val or test.
    """

    def __init__(self, runner: Any, opt: Dict[str, Any], phase: str):
        self.opt, self.runner, self.phase, self.count = opt, runner, phase, 0
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.weights = opt["path"].get("pretrain_network_g")
        self.losses: Dict[str, float] = {}
        if isinstance(self.model, MMBIRDModel):
            self.weights = self.model.restorer.prior.file

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.model.task.device

    def feed_data(self, data: Dict[str, Any]) -> None:
        """Take a sample: sets ``lq`` and, where there is one, ``gt``."""
        self.data, self.lq = data, data["lq"]
        self.__dict__.pop("gt", None)
        if "gt" in data:
            self.gt = data["gt"]
        self.runner.call_hook(f"before_{self.phase}_iter", batch_idx=self.count, data_batch=data)

    def test(self) -> None:
        """Restore the sample: sets ``output`` and ``initial``."""
        samples = self.model.val_step(self.data)
        (sample,) = samples
        self.output, self.files = sample["output"].unsqueeze(0), sample.get("files", {})
        self.initial = sample["initial"].unsqueeze(0) if "initial" in sample else None
        hook = f"after_{self.phase}_iter"
        self.runner.call_hook(hook, batch_idx=self.count, data_batch=self.data, outputs=samples)
        self.count += 1

    def get_current_visuals(self) -> Dict[str, Any]:
        """Images of the last sample by name, on the CPU."""
        visuals = super().get_current_visuals()
        if self.initial is not None:
            visuals["initial"] = self.initial.detach().cpu()
        return visuals

    def result_files(self) -> Dict[str, bytes]:
        """Further files of the last sample: end of the name -> content."""
        return self.files


class Generating(Restoring):
    """A prior in validation and test, which restores nothing: losses by noise level, and samples."""

    def nondist_validation(self, dataloader: DataLoader, current_iter: Any, tb_logger: Any, save_img: bool) -> None:
        """Measure the losses by noise level, and draw samples."""
        task = self.model.task
        log = get_root_logger().info
        self.losses = task.validate(self.model.net, dataloader.dataset, current_iter, save_img, log)

    dist_validation = nondist_validation


@LOOPS.register_module()
class RestorationLoop(BaseLoop):
    """Validation (``val``) or test (``test``) of an option file: as :mod:`ucdir_plugin.training.loop` under BasicSR.

    Args:
        dataloader: of the first data set; MMEngine asks for its length.
        evaluator: MMEngine's, without use: ``val: metrics`` are measured.
        datasets: BasicSR's, all of them.
        opt: of the option file, complete.
        phase: val or test.

    Attributes:
        code: the exit code of a test.
    """

    def __init__(
        self, runner: Any, dataloader: Any, evaluator: Any, datasets: list, opt: Dict[str, Any], phase: str = "val"
    ):
        super().__init__(runner, dataloader)
        self.evaluator, self.datasets, self.opt, self.phase, self.code = evaluator, datasets, opt, phase, 0

    def run(self) -> Dict[str, float]:
        runner = self.runner
        runner.call_hook(f"before_{self.phase}")
        runner.call_hook(f"before_{self.phase}_epoch")
        runner.model.eval()
        kind = Generating if self.opt["model_type"] == "DiffusionPriorModel" else Restoring
        model = kind(runner, self.opt, self.phase)
        metrics: Dict[str, float] = {}
        hook = stop_hook(runner)
        sharded = isinstance(runner.model, FullyShardedDataParallel)  # its module has no whole weights else
        with FullyShardedDataParallel.summon_full_params(runner.model, writeback=False) if sharded else nullcontext():
            if self.phase == "test":
                self.code = testing.test_sets(self.opt, model, self.datasets)
            for dataset in self.datasets if self.phase == "val" else ():
                results = testing.validate_set(self.opt, model, dataset, runner.iter, None, hook and hook.stop)
                found = flat(results) if results is not None else model.losses
                several = f"{dataset.opt['name']}/" if len(self.datasets) > 1 else ""
                metrics.update({f"{several}{name}": value for name, value in found.items()})
        runner.call_hook(f"after_{self.phase}_epoch", metrics=metrics)
        runner.call_hook(f"after_{self.phase}")
        return metrics
