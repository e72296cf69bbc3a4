"""JPEG compression on the fly."""

from __future__ import annotations

import os
import random
from typing import Any

import cv2
import numpy as np
from basicsr.data.transforms import augment
from torch.utils.data import Dataset

from ucdir_plugin.data.paired_dataset import check_crop, option, some_of, to_sample
from ucdir_plugin.errors import UserError
from ucdir_plugin.imageio import decode_image, image_size, list_images, read_bytes
from ucdir_plugin.registry import register


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress and decompress with OpenCV's encoder: (H, W, 3) BGR in [0, 1] -> the same, quality 1 .. 100."""
    encoded = cv2.imencode(".jpg", (image * 255).round().astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR).astype(np.float32) / 255.0


@register("dataset")
class JPEGDataset(Dataset):
    """A folder of photographs and their JPEG-compressed versions.

    In training a random crop is compressed, so that blocks start at the crop's corner, as they start at an image's
    corner in the test, where the whole image is compressed.

    Args:
        opt: ``dataroot_gt``; ``quality``: 1 .. 100, or [low, high] to draw from in training (the test takes the
            middle); ``gt_size`` (crop, in training), ``use_hflip``, ``use_rot``.

    Raises:
        UserError: for a missing or empty folder, a wrong quality, an unreadable image or one smaller than the crop.
    """

    def __init__(self, opt: dict):
        self.opt = opt
        self.train = opt["phase"] == "train"
        self.root = option(opt, "dataroot_gt")
        quality = option(opt, "quality")
        self.quality = (quality, quality) if isinstance(quality, int) else tuple(quality)
        if not 1 <= self.quality[0] <= self.quality[1] <= 100:
            raise UserError(f"option datasets: {opt['name']}: quality {quality} is not within 1 .. 100")
        self.crop = option(opt, "gt_size") if self.train else None
        self.names = list_images(self.root, f"option datasets: {opt['name']}: dataroot_gt")
        for name in some_of(self.names):
            size = image_size(os.path.join(self.root, name))
            if self.crop:
                check_crop(size, self.crop, os.path.join(self.root, name))

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self.root, self.names[index])
        gt = decode_image(read_bytes(path), path)
        quality = sum(self.quality) // 2
        if self.train:
            height, width = gt.shape[:2]
            check_crop((height, width), self.crop, path)
            top, left = random.randint(0, height - self.crop), random.randint(0, width - self.crop)
            gt = gt[top : top + self.crop, left : left + self.crop]
            gt = augment(gt, self.opt["use_hflip"], self.opt["use_rot"])
            quality = random.randint(*self.quality)
        return to_sample({"lq": jpeg(gt, quality), "gt": gt}, {"lq": path, "gt": path}, self.names[index])

    def __len__(self) -> int:
        return len(self.names)
