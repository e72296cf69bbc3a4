"""Folders of true images, degraded on the fly by other datasets, or as they are."""

from __future__ import annotations

import os
import random
from typing import Any, ClassVar, Dict, Optional, Tuple, Union

import cv2
import numpy as np
from torch.utils.data import Dataset

from ucdir_plugin.compat import augment, get_root_logger
from ucdir_plugin.data.samples import check_crop, constant, flips, option, some_of, to_sample
from ucdir_plugin.diffusion.noise import key_to_seed
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import decode_image, image_size, list_images, read_bytes
from ucdir_plugin.utils.option_types import Int


class CleanImages(Dataset):
    """A folder of true images with its subfolders; what datasets that degrade on the fly have in common.

    Args:
        opt: ``dataroot_gt``; ``gt_size`` (crop, in training), ``use_hflip``, ``use_rot``; ``condition`` (values that
            are the same for all samples).

    Raises:
        UserError: for a missing or empty folder, an unreadable image or one smaller than the crop.
    """

    def __init__(self, opt: dict):
        self.opt = opt
        self.train = opt["phase"] == "train"
        self.root = option(opt, "dataroot_gt")
        self.crop = option(opt, "gt_size") if self.train else None
        self.condition = opt.get("condition", {})
        self.names = list_images(self.root, f"option datasets: {opt['name']}: dataroot_gt")
        for name in some_of(self.names):
            size = image_size(os.path.join(self.root, name))
            if self.crop:
                check_crop(size, self.crop, os.path.join(self.root, name))

    @staticmethod
    def condition_ranges(opt: dict) -> dict[str, tuple]:
        """Conditions that its samples have, by its options: name -> smallest and largest value, or all."""
        return constant(opt)

    def read(self, index: int) -> tuple[np.ndarray, str]:
        """Image (H, W, 3) BGR in [0, 1], in training a crop of it, perhaps flipped and turned; and its path."""
        path = os.path.join(self.root, self.names[index])
        gt = decode_image(read_bytes(path), path)
        if self.train:
            height, width = gt.shape[:2]
            check_crop((height, width), self.crop, path)
            top, left = random.randint(0, height - self.crop), random.randint(0, width - self.crop)
            gt = gt[top : top + self.crop, left : left + self.crop]
            gt = augment(gt, *flips(self.opt))
        return gt, path

    def generator(self, index: int) -> np.random.Generator:
        """Randomness of a sample: in training another in each epoch, in a test by ``seed`` and the image's key."""
        if self.train:
            return np.random.default_rng(random.getrandbits(63))
        return np.random.default_rng(key_to_seed(self.opt.get("seed") or 0, "degradation", self.names[index]))

    def __len__(self) -> int:
        return len(self.names)


@register("dataset")
class CleanImageDataset(CleanImages):
    """Square views of photographs, for what learns images themselves: crops of them, or of them made smaller.

    In training the view, its flips and turns are random; in a test each image gives the one view that its file name
    and ``seed`` draw. Images smaller than the crop are left out and counted.

    Args:
        opt: ``dataroot_gt``, ``gt_size`` (side of a view), ``view_scale`` (how much smaller an image may be made
            before it is cropped: [low, high] within (0, 1], uniform; default 1, not at all; a scale too small for the
            crop is raised to the smallest that fits), ``use_hflip``, ``use_rot``, ``seed``.

    Raises:
        UserError: for a missing folder, a wrong scale, or if no image is large enough.
    """

    options: ClassVar[Dict[str, Any]] = {
        "view_scale": Union[float, Tuple[float, float], None],
        "seed": Optional[Int],
    }

    def __init__(self, opt: dict):
        scale = opt.get("view_scale") or 1.0
        self.scale = (scale, scale) if isinstance(scale, (int, float)) else tuple(scale)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"option datasets: {opt['name']}: view_scale {scale} is not within 0 .. 1, low before high")
        self.opt, self.train = opt, opt["phase"] == "train"
        self.root, self.crop = option(opt, "dataroot_gt"), option(opt, "gt_size")
        names = list_images(self.root, f"option datasets: {opt['name']}: dataroot_gt")
        self.names = [name for name in names if min(image_size(os.path.join(self.root, name))) >= self.crop]
        self.skipped = len(names) - len(self.names)
        if not self.names:
            raise UserError(
                f"option datasets: {opt['name']}: none of the {len(names)} images in {self.root} has"
                f" {self.crop} pixels a side; lower gt_size"
            )
        if self.skipped:
            get_root_logger().warning(
                f"{opt['name']}: {self.skipped} of {len(names)} images left out: smaller than gt_size {self.crop}"
            )

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, rng = os.path.join(self.root, self.names[index]), self.generator(index)
        image = decode_image(read_bytes(path), path)
        check_crop(image.shape[:2], self.crop, path)
        # Cut first what the view shows, so that only this is resized.
        side = min(round(self.crop / rng.uniform(*self.scale)), *image.shape[:2])
        top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
        view = image[top : top + side, left : left + side]
        if side > self.crop:
            view = cv2.resize(view, (self.crop, self.crop), interpolation=cv2.INTER_AREA)
        if self.train:
            view = augment(view, *flips(self.opt))
        return to_sample({"gt": view}, {"gt": path}, self.names[index], {})
