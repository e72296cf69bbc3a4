"""What restoring costs: memory and time over the image's size, and quality over samplers and steps."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any, Callable, Dict, List, Optional

import torch
from basicsr.data import build_dataset
from basicsr.utils import tensor2img

from ucdir_plugin import report
from ucdir_plugin.benchmark import alternate, peak_memory, result
from ucdir_plugin.errors import UserError
from ucdir_plugin.evaluation import measure
from ucdir_plugin.options import load_options
from ucdir_plugin.restorer import Restorer, load_model

SIZES = ((512, 512), (1024, 1024), (1416, 2120), (3000, 4000))
"""Height and width: 0.26, 1, 3 and 12 megapixels."""

STEPS = (5, 10, 20, 50)


def _image(height: int, width: int) -> torch.Tensor:
    """A smooth picture with some noise: (1, 3, H, W) in [0, 1]."""
    wave = torch.sin(torch.arange(height) / 37)[:, None] * torch.cos(torch.arange(width) / 53)
    return (wave * 0.4 + 0.5 + 0.03 * torch.randn(1, 3, height, width)).clamp_(0, 1)


def _call(opt: str, weights: Optional[str], tile: int, overlap: int, height: int, width: int) -> Callable[[], Any]:
    """Two steps of ddpm on one image."""
    sampling = {"sampler": "ddpm", "steps": 2, "tile": tile, "overlap": overlap}
    return _restoring(load_model(opt, weights, sampling=sampling), height, width)


def _restoring(model: Restorer, height: int, width: int) -> Callable[[], Any]:
    def call() -> None:
        torch.manual_seed(0)
        for _ in model.run(_image(height, width), "").samples:
            pass

    return call


def growth(opt: str, weights: Optional[str], tile: int, overlap: int, repeats: int) -> List[dict]:
    """Memory and seconds of two ddpm steps at four sizes with patches of one size."""
    model = load_model(opt, weights, sampling={"sampler": "ddpm", "steps": 2, "tile": tile, "overlap": overlap})
    if not model.diffusion:
        raise UserError(f"{opt}: the benchmark of restoring is for networks with diffusion")
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


def quality(opt: str, weights: Optional[str], samplers: List[str], seeds: int) -> List[dict]:
    """Metrics of the option file's validation set for each sampler and number of steps.

    Args:
        samplers: ``NAME`` or ``NAME:SPACING``.
        seeds: means are taken over the seeds 0 .. seeds - 1.
    """
    options = load_options(opt, is_train=False)
    metrics = options["val"].get("metrics") or {}
    phase, data = next(((p, d) for p, d in options["datasets"].items() if p.startswith(("val", "test"))), (None, None))
    if data is None or not metrics:
        raise UserError(f"{opt}: a val dataset and val:metrics are needed to measure quality")
    samples = list(build_dataset({**data, "phase": phase.split("_")[0], "scale": options["scale"]}))

    def means(rows: List[report.Row]) -> Dict[str, Any]:
        return {k: None if v is None else round(v, 3) for k, v in report.means(rows)["of"].items()}

    def measured(image: torch.Tensor, truth: torch.Tensor) -> report.Row:
        return {"image": "", "metrics": {"of": measure(tensor2img(image), tensor2img(truth), metrics)}}

    model = load_model(opt, weights)
    predictions = [next(model.run(s["lq"].unsqueeze(0).clone(), "", blend=0).samples) for s in samples]
    before = {"input": [s["lq"] for s in samples], "initial prediction": predictions}
    rows: List[Dict[str, Any]] = []
    for name, images in before.items():
        found = [measured(image, s["gt"]) for image, s in zip(images, samples)]
        rows.append({"sampler": name, "steps": "", "NFE": 0, "s per image": "", **means(found)})
    for name, steps in itertools.product(samplers, STEPS):
        sampler, _, spacing = name.partition(":")
        sampling = {"sampler": sampler, "steps": steps, **({"spacing": spacing} if spacing else {})}
        model = load_model(opt, weights, sampling=sampling)
        found, seconds = [], []
        for sample, seed in itertools.product(samples, range(seeds)):
            started = time.perf_counter()
            (image,) = model.run(sample["lq"].unsqueeze(0).clone(), sample["key"], seed=seed).samples
            seconds.append(time.perf_counter() - started)
            found.append(measured(image, sample["gt"]))
        nfe = model.plan(*samples[0]["lq"].shape[-2:]).nfe
        took = round(statistics.median(seconds), 2)
        rows.append({"sampler": name, "steps": steps, "NFE": nfe, "s per image": took, **means(found)})
    where = f"{data['name']}, {len(samples)} images, {seeds} seed{'s' * (seeds > 1)}, weights {model.about['weights']}"
    return [result(f"quality over sampler and steps: {where}", rows)]
