"""Unconditional diffusion under BasicSR: training the prior of BIR-D on a folder of images."""

from __future__ import annotations

from typing import Any

from basicsr.utils import get_root_logger

from ucdir_plugin.models.diffusion_model import DiffusionModel
from ucdir_plugin.registry import register
from ucdir_plugin.training.prior_task import PriorTask


@register("model")
class DiffusionPriorModel(DiffusionModel):
    """Trains a prior: :class:`~ucdir_plugin.training.prior_task.PriorTask` under BasicSR.

    Images enter and leave in [0, 1] RGB; between they are in [-1, 1]. Option keys besides BasicSR's: ``diffusion``,
    ``train: diffusion_opt, variance_opt`` (the loss on learned variances) and those of all diffusion models, ``val:
    samples, sampling``; see options/prior/natural64.yml. :func:`ucdir_plugin.zoo.priors.load_prior` reads its files.

    Raises:
        UserError: for a network of another kind, or one whose variance and losses do not go together.
    """

    task_class = PriorTask

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``gt`` (B, 3, H, W) in [0, 1], and ``sample_number``."""
        self.take(data)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img: bool) -> None:
        """Loss by noise level over the images, and a grid of samples; all ranks share in the loss, rank 0 samples."""
        dataset = dataloader.dataset
        net = self.net_to_use()
        training, net = net.training, net.eval()
        losses = self.task.validate(net, dataset, current_iter, save_img, get_root_logger().info)
        for key, value in losses.items() if tb_logger else ():
            tb_logger.add_scalar(f"losses/{dataset.opt['name']}/{key}", value, current_iter)
        self.task.train_mode(net, training)

    dist_validation = nondist_validation
