"""Folders of true images, which datasets degrade on the fly."""

from __future__ import annotations

import os
import random

import numpy as np
from basicsr.data.transforms import augment
from torch.utils.data import Dataset

from ucdir_plugin.data.paired_dataset import check_crop, constant, option, some_of
from ucdir_plugin.diffusion.noise import key_to_seed
from ucdir_plugin.imageio import decode_image, image_size, list_images, read_bytes


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
    def tells(opt: dict) -> dict[str, tuple]:
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
            gt = augment(gt, self.opt["use_hflip"], self.opt["use_rot"])
        return gt, path

    def generator(self, index: int) -> np.random.Generator:
        """Randomness of a sample: in training another in each epoch, in a test by ``seed`` and the image's key."""
        if self.train:
            return np.random.default_rng(random.getrandbits(63))
        return np.random.default_rng(key_to_seed(self.opt.get("seed") or 0, "degradation", self.names[index]))

    def __len__(self) -> int:
        return len(self.names)
