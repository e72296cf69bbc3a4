"""Pairs of degraded and true images, checked before training starts."""

from __future__ import annotations

import collections
import csv
import math
import os
from typing import Any, ClassVar, Dict, Optional

import numpy as np
from torch.utils.data import Dataset

from ucdir_plugin.compat import FileClient, augment, paired_random_crop
from ucdir_plugin.data.lmdbs import lmdb_sizes, read_lmdb_names
from ucdir_plugin.data.samples import check_crop, constant, flips, option, some_of, to_sample
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import UserError, did_you_mean
from ucdir_plugin.utils.image_reading import check_inside, decode_image, image_size, images_by_stem, list_images


def read_conditions(path: str) -> dict[str, dict[str, Any]]:
    """A CSV with the columns ``name`` (an image's relative path without extension) and one for each condition.

    Returns:
        name -> condition -> value. A column of numbers gives numbers, NaN where a cell is empty; others give classes,
        "" where one is.

    Raises:
        UserError: if it cannot be read, or has no column ``name``.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a mark in front
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise UserError(f"condition_file {path} cannot be read: {getattr(err, 'strerror', None) or err}") from err
    if not rows or "name" not in rows[0] or any(None in row for row in rows):
        raise UserError(f"condition_file {path}: a first line such as name,ratio is expected, and lines of its columns")
    names = collections.Counter(row["name"] for row in rows)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise UserError(f"condition_file {path}: {twice} has {names[twice]} lines; keep one")
    columns = {key: _column([row[key] or "" for row in rows]) for key in rows[0] if key != "name"}
    return {row["name"]: {key: column[i] for key, column in columns.items()} for i, row in enumerate(rows)}


def _column(cells: list[str]) -> list[Any]:
    try:
        return [float(cell) if cell else math.nan for cell in cells]
    except ValueError:
        return cells


@register("dataset")
class PairedRestorationDataset(Dataset):
    """Pairs of images of one size, from two folders (with subfolders), a list, or LMDBs; in a test also images alone.

    BasicSR's ``PairedImageDataset`` with the same options and samples, which besides reads 16 bits at full precision,
    sorts the pairs, accepts a different extension within a pair, and checks names and sizes when it is built.

    Args:
        opt: ``dataroot_lq``, ``dataroot_gt`` (may be left out in a test); ``meta_info_file`` (names below dataroot_gt,
            one a line); ``filename_tmpl`` (of the degraded image's name, default '{}'); ``io_backend`` (disk or lmdb);
            ``gt_size`` (crop, in training), ``use_hflip``, ``use_rot``; ``condition`` (the same for all images) and
            ``condition_file`` (see :func:`read_conditions`).

    Raises:
        UserError: for missing folders, images without a partner or a line in ``condition_file``, sizes that differ,
            images smaller than the crop.
    """

    options: ClassVar[Dict[str, Any]] = {
        "dataroot_lq": Optional[str],
        "meta_info_file": Optional[str],
        "filename_tmpl": str,
        "io_backend": dict,
        "condition_file": Optional[str],
    }

    def __init__(self, opt: dict):
        self.opt = opt
        self.train = opt["phase"] == "train"
        lq = option(opt, "dataroot_lq")
        gt = option(opt, "dataroot_gt") if self.train else opt.get("dataroot_gt")
        self.crop = option(opt, "gt_size") if self.train else None
        self.client: FileClient | None = None
        self.backend = dict(opt.get("io_backend") or {"type": "disk"})
        if self.backend.get("type") not in ("disk", "lmdb"):
            kind = self.backend.get("type")
            raise UserError(f"option datasets: {opt['name']}: io_backend: there is no type {kind!r}; use disk or lmdb")
        strange = next((key for key in self.backend if key != "type"), None)
        if strange is not None:
            raise UserError(f"unknown option datasets: {opt['name']}: io_backend: {strange}; it has a type only")
        if gt is None:
            names = list_images(lq, f"option datasets: {opt['name']}: dataroot_lq")
            self.pairs = [(name, os.path.join(lq, name), None) for name in names]
            for _, lq_path, _ in some_of(self.pairs):
                image_size(lq_path)
        elif self.backend["type"] == "lmdb":
            self.backend.update(db_paths=[lq, gt], client_keys=["lq", "gt"])
            self.pairs = self._pair_lmdbs(gt, lq)
        else:
            self.pairs = self._pair_files(gt, lq)
            for _, lq_path, gt_path in some_of(self.pairs):
                self._check_sizes((image_size(lq_path), lq_path), (image_size(gt_path), gt_path))
        table = read_conditions(opt["condition_file"]) if opt.get("condition_file") else {}
        self.conditions = []
        for key, _, _ in self.pairs:
            name = os.path.splitext(key)[0]
            if table and name not in table:
                raise UserError(
                    f"condition_file {opt['condition_file']} has no line {name}; {did_you_mean(name, table)}"
                )
            self.conditions.append({**opt.get("condition", {}), **table.get(name, {})})

    @staticmethod
    def condition_ranges(opt: dict) -> dict[str, tuple]:
        """Conditions that its samples have: name -> the values that there are."""
        ranges = constant(opt)
        if opt.get("condition_file"):
            rows = list(read_conditions(os.path.expanduser(opt["condition_file"])).values())
            ranges.update((name, tuple(dict.fromkeys(row[name] for row in rows))) for name in rows[0])
        return ranges

    def _check_sizes(self, lq: tuple[tuple[int, int], str], gt: tuple[tuple[int, int], str]) -> None:
        """Compare the sizes of a pair, ((height, width), path) each."""
        if lq[0] != gt[0]:
            (lh, lw), (gh, gw) = lq[0], gt[0]
            raise UserError(f"the pair {lq[1]} ({lw}x{lh}) and {gt[1]} ({gw}x{gh}) differs in size")
        if self.crop:
            check_crop(gt[0], self.crop, gt[1])

    def _pair_lmdbs(self, gt: str, lq: str) -> list[tuple[str, str, str | None]]:
        """As :meth:`_pair_files`, with the LMDBs' keys for paths; an image is called as its file was."""
        names = {root: read_lmdb_names(root) for root in (lq, gt)}
        for root, other in ((lq, gt), (gt, lq)):
            lonely = sorted(names[root].keys() - names[other].keys())
            if lonely:
                raise UserError(f"LMDB {root}: {lonely[0]} has no partner in {other}")
        sizes = {root: lmdb_sizes(root, names[root]) for root in (lq, gt)}
        for name in sorted(sizes[lq].keys() & sizes[gt].keys()):
            self._check_sizes(*((sizes[root][name], os.path.join(root, name)) for root in (lq, gt)))
        return [(f"{name}.png", name, name) for name in sorted(names[gt])]

    def _pair_files(self, gt: str, lq: str) -> list[tuple[str, str, str | None]]:
        """(key, degraded path, true path) of each pair, by relative path without extension."""
        what = f"option datasets: {self.opt['name']}: dataroot_"
        template = self.opt.get("filename_tmpl", "{}")
        try:
            template.format("a")
        except (LookupError, ValueError, AttributeError) as err:
            raise UserError(
                f"option datasets: {self.opt['name']}: filename_tmpl {template!r}: one {{}} is expected, for the name"
            ) from err
        degraded = images_by_stem(lq, f"{what}lq")
        if self.opt.get("meta_info_file"):
            try:
                with open(self.opt["meta_info_file"], encoding="utf-8") as file:
                    names = [line.split(" ")[0].strip() for line in file if line.strip()]
            except (OSError, UnicodeDecodeError) as err:
                reason = getattr(err, "strerror", None) or "it is no text"
                raise UserError(f"meta_info_file {self.opt['meta_info_file']} cannot be read: {reason}") from err
            if not names:
                raise UserError(f"meta_info_file {self.opt['meta_info_file']} names no image")
        else:
            names = list_images(gt, f"{what}gt")
        pairs = []
        for name in names:
            check_inside(name, f"{what}gt" if not self.opt.get("meta_info_file") else self.opt["meta_info_file"])
            folder, base = os.path.split(os.path.splitext(name)[0])
            partner = f"{folder}/" * bool(folder) + template.format(base)
            if partner not in degraded:
                raise UserError(
                    f"{os.path.join(gt, name)} has no partner {partner}.* in {lq}; {did_you_mean(partner, degraded)}"
                )
            pairs.append((name, os.path.join(lq, degraded.pop(partner)), os.path.join(gt, name)))
        if degraded and not self.opt.get("meta_info_file"):
            lonely = next(iter(degraded.values()))
            raise UserError(f"{os.path.join(lq, lonely)} has no partner in {gt}; remove it or add its true image")
        return pairs

    def _read(self, path: str, kind: str) -> np.ndarray:
        if self.client is None:
            backend = dict(self.backend)
            self.client = FileClient(backend.pop("type"), **backend)
        try:
            return decode_image(self.client.get(path, kind), path)
        except OSError as err:
            raise UserError(f"image {path} cannot be read: {err.strerror}") from err

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, lq_path, gt_path = self.pairs[index]
        if gt_path is None:
            return to_sample({"lq": self._read(lq_path, "lq")}, {"lq": lq_path}, key, self.conditions[index])
        lq, gt = self._read(lq_path, "lq"), self._read(gt_path, "gt")
        if lq.shape != gt.shape:
            raise UserError(f"the pair {lq_path} {lq.shape[1::-1]} and {gt_path} {gt.shape[1::-1]} differs in size")
        if self.train:
            check_crop(gt.shape[:2], self.crop, gt_path)
            gt, lq = paired_random_crop(gt, lq, self.crop, 1, gt_path)
            gt, lq = augment([gt, lq], *flips(self.opt))
        return to_sample({"lq": lq, "gt": gt}, {"lq": lq_path, "gt": gt_path}, key, self.conditions[index])

    def __len__(self) -> int:
        return len(self.pairs)
