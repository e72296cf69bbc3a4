"""UCDIR under BasicSR: joint training of predictor and denoiser, EMA, sampling."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from ucdir_plugin.models.diffusion_model import DiffusionModel
from ucdir_plugin.registry import register
from ucdir_plugin.training.task import unsigned
from ucdir_plugin.training.ucdir_task import UCDIRTask
from ucdir_plugin.training.validation import validate


@register("model")
class UCDIRModel(DiffusionModel):
    """Trains and samples :class:`~ucdir_plugin.archs.UCDIR` (paper, section 3): a :class:`UCDIRTask` under BasicSR.

    Images enter and leave in [0, 1] RGB; between they are in [-1, 1]. Option keys besides BasicSR's: ``diffusion`` (the
    training schedule), ``train: diffusion_opt, initial_opt, ema_start, grad_clip, accumulate, amp, max_bad_steps`` and
    ``val: sampling``; see options/sid_ucdir.yml.
    """

    task_class = UCDIRTask

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``lq`` and perhaps ``gt`` (B, 3, H, W) in [0, 1]; ``sample_number`` or, in test, ``key``.

        And ``condition``, name -> values of the batch, where the network declares conditions.

        Raises:
            UserError: for a condition that is missing or out of its range.
        """
        self.take(data)
        self.lq = data["lq"]
        self.__dict__.pop("gt", None)
        if "gt" in data:
            self.gt = data["gt"]
        self.keys = list(data["key"]) if "key" in data else [str(p) for p in data.get("lq_path", [""] * len(self.lq))]

    def test(self) -> None:
        """Restore ``self.lq``: sets ``self.initial`` and ``self.output``, (B, 3, H, W) in [0, 1] up to overshoot.

        The noise of an image is a function of the seed and the image's key alone.
        """
        net = self.net_to_use()
        training, net = net.training, net.eval()
        initial, output = self.task.restore(net, self.batch, self.keys)
        self.initial, self.output = unsigned(initial), unsigned(output)
        self.task.train_mode(net, training)

    def get_current_visuals(self) -> OrderedDict:
        """Images of the last sample by name, on the CPU; the initial prediction too."""
        visuals = super().get_current_visuals()
        if self.task.has_predictor:
            visuals["initial"] = self.initial.detach().cpu()
        return visuals

    def validation(self, dataloader, current_iter, tb_logger, save_img: bool = False) -> None:
        """BasicSR's entry point; the work is in :func:`ucdir_plugin.training.validation.validate`."""
        validate(self, dataloader.dataset, current_iter, tb_logger, save_img)
