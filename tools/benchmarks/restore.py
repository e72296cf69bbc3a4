"""What restoring costs and gives: memory and time over the image's size, quality over samplers and steps, seams."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch

from ucdir_plugin import compat  # noqa: F401  (BasicSR can be imported only after it)

# isort: split
from basicsr.data import build_dataset
from basicsr.utils import tensor2img
from tqdm import tqdm
from ucdir_cli.benchmarks.timing import alternate, peak_memory, result

from ucdir_plugin.diffusion.tiling import borders_in_image
from ucdir_plugin.evaluation import tables
from ucdir_plugin.evaluation.measure import measure
from ucdir_plugin.metrics.seams import seam_score
from ucdir_plugin.options.check import load_options
from ucdir_plugin.restoration.load import load_model
from ucdir_plugin.restoration.network import NetworkRestorer
from ucdir_plugin.restoration.sampling import grid_of
from ucdir_plugin.utils import image_writing
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_writing import write_image

SIZES = ((512, 512), (1024, 1024), (1416, 2120), (3000, 4000))
"""Height and width: 0.26, 1, 3 and 12 megapixels."""

STEPS = (5, 10, 20, 50)


def _image(height: int, width: int) -> torch.Tensor:
    """A smooth picture with some noise: (1, 3, H, W) in [0, 1]."""
    wave = torch.sin(torch.arange(height) / 37)[:, None] * torch.cos(torch.arange(width) / 53)
    return (wave * 0.4 + 0.5 + 0.03 * torch.randn(1, 3, height, width)).clamp_(0, 1)


def condition_of(model: NetworkRestorer, sample: Dict[str, Any]) -> Dict[str, Any]:
    """What a sample says of the conditions that the network declares."""
    said = sample.get("condition", {})
    return {condition.name: said[condition.name] for condition in model.conditions if condition.name in said}


def _call(opt: str, weights: Optional[str], tile: int, overlap: int, height: int, width: int) -> Callable[[], Any]:
    """Two steps of ddpm on one image."""
    sampling = {"sampler": "ddpm", "steps": 2, "tile": tile, "overlap": overlap}
    return _restoring(load_model(opt, weights, sampling=sampling), height, width)


def _restoring(model: NetworkRestorer, height: int, width: int) -> Callable[[], Any]:
    some = {c.name: c.classes[0] if c.classes else c.limits[0] for c in model.conditions}  # any will do

    def call() -> None:
        torch.manual_seed(0)
        for _ in model.run(_image(height, width), "", condition=some).samples:
            pass

    return call


def growth(opt: str, weights: Optional[str], tile: int, overlap: int, repeats: int) -> List[dict]:
    """Memory and seconds of two ddpm steps at four sizes with patches of one size."""
    model = load_model(opt, weights, sampling={"sampler": "ddpm", "steps": 2, "tile": tile, "overlap": overlap})
    seconds = alternate({str(size): _restoring(model, *size) for size in SIZES}, repeats)
    rows = []
    for height, width in SIZES:
        plan = model.plan(height, width)
        peak = peak_memory(_call, opt, weights, tile, overlap, height, width)
        state = 5 * 3 * 4 * height * width / 2**20  # input, prediction, x_t, eps, noise
        took = seconds[str((height, width))]
        rows.append(
            {
                "megapixels": round(height * width / 1e6, 2),
                "patches": plan.patches,
                "computed / image": round(plan.computed_ratio, 3),
                "peak MB": round(peak),
                "5 tensors of the image's size, MB": round(state),
                "the rest, MB": round(peak - state),
                "seconds": round(took, 2),
                "seconds per computed megapixel and step": round(took / plan.pixels * 1e6, 3),
            }
        )
    each = [row["seconds per computed megapixel and step"] for row in rows]
    title = (
        f"2 ddpm steps in patches of {tile} with overlap {overlap};"
        f" slowest / fastest computed megapixel {max(each) / min(each):.2f}"
    )
    return [result(title, rows)]


def validation_samples(options: dict, opt: str) -> Tuple[str, List[Dict[str, Any]]]:
    """Name and samples of the first validation or test set.

    Raises:
        UserError: if there is none, or it has no true images.
    """
    for phase, data in options["datasets"].items():
        if phase.startswith(("val", "test")):
            dataset = build_dataset({**data, "phase": phase.split("_")[0], "scale": options["scale"]})
            samples = list(dataset)
            if any("gt" not in sample for sample in samples):
                raise UserError(
                    f"{opt}: option datasets:{phase}: it has no true images to measure with: set dataroot_gt"
                )
            return data["name"], samples
    raise UserError(f"{opt}: option datasets: there is no val or test dataset to measure on")


def quality(opt: str, weights: Optional[str], samplers: List[str], seeds: int) -> List[dict]:
    """Metrics of the option file's validation set for each sampler and number of steps.

    Args:
        samplers: ``NAME`` or ``NAME:SPACING``.
        seeds: means are taken over the seeds 0 .. seeds - 1.
    """
    options = load_options(opt, is_train=False)
    metrics = options["val"].get("metrics")
    if not metrics:
        raise UserError(f"{opt}: option val:metrics is missing: it says what to measure")
    dataset, samples = validation_samples(options, opt)

    def means(rows: List[tables.Row]) -> Dict[str, Any]:
        return {k: None if v is None else round(v, 3) for k, v in tables.means(rows)["of"].items()}

    def measured(image: torch.Tensor, truth: torch.Tensor) -> tables.Row:
        return {"image": "", "metrics": {"of": measure(tensor2img(image), tensor2img(truth), metrics)}}

    model = load_model(opt, weights)
    predictions = [
        next(model.run(s["lq"].unsqueeze(0).clone(), "", blend=0, condition=condition_of(model, s)).samples)
        for s in samples
    ]
    before = {"input": [s["lq"] for s in samples], "initial prediction": predictions}
    rows: List[Dict[str, Any]] = []
    for name, images in before.items():
        found = [measured(image, s["gt"]) for image, s in zip(images, samples)]
        rows.append({"sampler": name, "steps": "", "NFE": 0, "s per image": "", **means(found)})
    for name, steps in tqdm(list(itertools.product(samplers, STEPS)), disable=None):
        sampler, _, spacing = name.partition(":")
        sampling = {"sampler": sampler, "steps": steps, **({"spacing": spacing} if spacing else {})}
        model = load_model(opt, weights, sampling=sampling)
        found, seconds = [], []
        for sample, seed in itertools.product(samples, range(seeds)):
            started = time.perf_counter()
            lq, condition = sample["lq"].unsqueeze(0).clone(), condition_of(model, sample)
            (image,) = model.run(lq, sample["key"], seed=seed, condition=condition).samples
            seconds.append(time.perf_counter() - started)
            found.append(measured(image, sample["gt"]))
        nfe = model.plan(*samples[0]["lq"].shape[-2:]).nfe
        took = round(statistics.median(seconds), 2)
        rows.append({"sampler": name, "steps": steps, "NFE": nfe, "s per image": took, **means(found)})
    where = f"{dataset}, {len(samples)} images, {seeds} seed{'s' * (seeds > 1)}, weights {model.about['weights']}"
    return [result(f"quality over sampler and steps: {where}", rows)]


def seams(opt: str, weights: Optional[str], tile: int, overlap: int, figure: Optional[str]) -> List[dict]:
    """Seam scores of the validation images for whole images, inter-step patch splitting and patches on their own.

    Args:
        figure: a PNG of the first image around its first crossing of borders, each way, twice as large.
    """
    patches = {"tile": tile, "overlap": overlap}
    ways = {"per patch": {"split": "per_patch", **patches}, "inter-step": patches, "whole": {"tile": 0}}
    models = {name: load_model(opt, weights, sampling=way) for name, way in ways.items()}
    samples = validation_samples(load_options(opt, is_train=False), opt)[1]
    scores: Dict[str, List[float]] = {name: [] for name in ["truth", *ways]}
    pictures = []
    for sample in samples:
        size, split = sample["lq"].shape[-2:], models["inter-step"]
        grid = grid_of(split.net, *size, split.options)
        if grid is None:
            raise UserError(f"{sample['key']} ({size[1]}x{size[0]}) is one patch of {tile}: give a smaller --tile")
        borders = borders_in_image(grid, *size, split.options.border)
        images = {"truth": sample["gt"]}
        for name, model in models.items():
            lq, condition = sample["lq"].unsqueeze(0).clone(), condition_of(model, sample)
            (images[name],) = model.run(lq, sample["key"], condition=condition).samples
        arrays = {name: tensor2img(image) for name, image in images.items()}
        for name, array in arrays.items():
            scores[name].append(seam_score(array, *borders))
        if not pictures:
            top, left = (max(0, at[0] - 64) if at else 0 for at in borders)
            crops = [arrays[name][top : top + 128, left : left + 128] for name in ways]
            pictures = [np.kron(crop, np.ones((2, 2, 1), np.uint8)) for crop in crops]
    if figure:
        write_image(image_writing.side_by_side(pictures), figure)
    rows = [{"way": name, **{s["key"]: round(v, 3) for s, v in zip(samples, of)}} for name, of in scores.items()]
    title = f"seam score at the borders of patches of {tile} with overlap {overlap}; 1: no seam shows"
    return [result(title, rows)]
