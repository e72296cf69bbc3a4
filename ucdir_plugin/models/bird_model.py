"""BIR-D under BasicSR: tools/test.py restores a data set with it, and measures."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel

from ucdir_plugin.registry import register
from ucdir_plugin.restoration import load
from ucdir_plugin.restoration.bird import restore_sample
from ucdir_plugin.training.validation import validate
from ucdir_plugin.utils.errors import UserError


@register("model")
class BIRDModel(SRModel):
    """Restores with a diffusion prior that nobody trained for it (BIR-D); it cannot be trained.

    Option keys besides BasicSR's: ``bird``, see options/bird/blind.yml.
    """

    def __init__(self, opt: dict):
        BaseModel.__init__(self, opt)

        if self.is_train:
            raise UserError("BIRDModel restores without training: use tools/test.py or tools/restore.py")
        self.restorer = load.from_options(opt, self.device)
        self.weights = self.restorer.prior.file

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take an image: ``lq`` (1, 3, h, w) in [0, 1] and ``key``; perhaps ``gt`` and ``known``, 0 in holes.

        Further observations, and masks that the data do not tell, are files that ``bird`` names.
        """
        self.lq = data["lq"]
        self.__dict__.pop("gt", None)
        if "gt" in data:
            self.gt = data["gt"]
        self.known = data.get("known")
        self.keys = list(data["key"]) if "key" in data else [str(p) for p in data.get("lq_path", [""] * len(self.lq))]

    def test(self) -> None:
        """Restore: sets ``output`` (1, 3, H, W) in [0, 1], ``initial`` (see ``BlindRestorer.guess``) and ``learned``.

        Raises:
            ImageError: if this image cannot be restored.
        """
        self.initial, self.output, self.learned = restore_sample(self.restorer, self.lq, self.keys, self.known)

    def validation(self, dataloader, current_iter, tb_logger, save_img: bool = False) -> None:
        """BasicSR's entry point; the work is in :func:`ucdir_plugin.training.validation.validate`."""
        validate(self, dataloader.dataset, current_iter, tb_logger, save_img)

    def get_current_visuals(self) -> OrderedDict:
        """Images of the last sample by name, on the CPU."""
        visuals = super().get_current_visuals()
        if self.initial is not None:
            visuals["initial"] = self.initial.detach().cpu()
        return visuals

    def result_files(self) -> dict[str, bytes]:
        """What was learned of the image: suffix of a name -> content."""
        return self.learned.files()
