"""One system on one case with one seed: restored, measured, kept.

A cell's folder has the restored images and metrics.json (report.as_data), which says what made it; a run goes on with
the cells that are missing or were made otherwise.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from ucdir_cli.studies.bird.cases import BORDER, CASES, SIZE, Case, Images
from ucdir_cli.studies.bird.classical import CLASSICAL, as_input

from ucdir_plugin.evaluation import tables
from ucdir_plugin.evaluation.measure import Evaluation
from ucdir_plugin.restoration import load
from ucdir_plugin.restoration.bird_options import known_kernel
from ucdir_plugin.utils.degradations import chain, degrade
from ucdir_plugin.utils.files import write_atomically
from ucdir_plugin.utils.image_reading import read_uint8
from ucdir_plugin.utils.image_writing import write_image

METRICS = {
    "psnr": {"type": "calculate_psnr", "crop_border": BORDER},
    "ssim": {"type": "calculate_ssim", "crop_border": BORDER},
    "lpips": {"type": "calculate_lpips", "crop_border": BORDER},
    "stlpips": {"type": "calculate_stlpips", "crop_border": BORDER},
}

NIQE_BLOCK = 96
"""Side of NIQE's blocks: it is of a mosaic of the images' middles of this size, as 128 pixels alone have one block."""

COLUMNS = {
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS", 3),
    "stlpips": ("ST-LPIPS", 3),
    "niqe": ("NIQE", 2),
    "consistency": ("Consistency", 1),
    "kernel_error": ("kernel error", 2),
}


@dataclass(frozen=True)
class Cell:
    """One system on one case.

    Attributes:
        case, system: names of :data:`CASES` and :data:`SYSTEMS`, or :data:`CLASSICAL`.
        prior: of the system; None of a classical one.
        seed: of its noise.
        bird, settings: further keys of ``bird:``, and of its ``settings``.
        images: how many.
    """

    case: str
    system: str
    prior: Optional[str] = None
    seed: int = 0
    bird: Tuple[Tuple[str, Any], ...] = ()
    settings: Tuple[Tuple[str, Any], ...] = ()
    images: int = 16

    @property
    def label(self) -> str:
        """In tables: what its seed does not change."""
        more = [f"{k} {v}" for k, v in (*self.bird, *self.settings) if k not in ("steps", "first_stage")]
        stage = dict(self.bird).get("first_stage")
        more += [f"first stage: {stage['use']}"] if stage else []
        prior = [os.path.basename(self.prior)] if self.prior else []
        return ", ".join([self.system, *prior, *more])

    @property
    def folder(self) -> str:
        """Where the cell's results lie, below the output folder."""
        changes = json.dumps([self.bird, self.settings], sort_keys=True)
        mark = "" if changes == "[[], []]" else f"_{hashlib.sha256(changes.encode()).hexdigest()[:8]}"
        prior = f"_{os.path.splitext(os.path.basename(self.prior))[0]}" if self.prior else ""
        return os.path.join("cells", self.case, f"{self.system}{prior}{mark}_n{self.images}_seed{self.seed}")


SYSTEMS: Dict[str, Dict[str, Any]] = {
    "gdp": {"preset": "gdp", "knows": True},
    "A": {"preset": "paper", "ablation": "A"},
    "B": {"preset": "paper", "ablation": "B"},
    "C": {"preset": "paper", "ablation": "C"},
    "BIR-D (paper)": {"preset": "paper"},
    "guided": {"preset": "guided"},
    "guided A": {"preset": "guided", "ablation": "A"},
    "guided B": {"preset": "guided", "ablation": "B"},
    "guided C": {"preset": "guided", "ablation": "C"},
    "default": {"preset": "default"},
    "known": {"preset": "default", "knows": True},
}
"""Name -> keys of ``bird:``; ``knows``: it is told the true blur."""

GENERATING = ("gdp", "A", "B", "C", "BIR-D (paper)", "guided", "guided A", "guided B", "guided C")
"""Systems that start from noise and take ``steps`` steps."""


def applies(system: str, case: Case) -> bool:
    """Whether a system restores such a case: models that learn no kernel are told one, or are not run."""
    if system in CLASSICAL:
        return case.task in CLASSICAL[system][1]
    if system == "known":
        return case.blur is not None
    return True


def _load(cell: Cell, steps: int) -> Any:
    case, keys = CASES[cell.case], dict(SYSTEMS[cell.system])
    if keys.pop("knows", False) and case.blur is not None:
        keys["blur"] = dict(case.blur)
    if keys["preset"] == "default":
        keys["noise"] = case.noise
    settings = dict(cell.settings)
    if cell.system in GENERATING:
        settings.setdefault("steps", steps)
    keys.update(task=case.task, prior=cell.prior, tile=0, **dict(cell.bird))
    return load.load_model("bird", device="cpu", bird=keys, sampling=settings)


def _unit(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) BGR uint8 -> (1, 3, H, W) RGB in [0, 1]."""
    return torch.from_numpy(image[..., ::-1].astype(np.float32) / 255).permute(2, 0, 1)[None]


def _bytes(image: torch.Tensor) -> np.ndarray:
    """The other way round: (3, H, W) in [0, 1]; what leaves the range is cut."""
    return (image.clamp(0, 1).permute(1, 2, 0).numpy()[..., ::-1] * 255).round().astype(np.uint8)


@dataclass
class Done:
    """What a system gave: for each image (H, W, 3) BGR uint8 or why it failed, and what else is known of the run."""

    images: Dict[str, np.ndarray] = field(default_factory=dict)
    failed: Dict[str, str] = field(default_factory=dict)
    kernel_error: Dict[str, float] = field(default_factory=dict)
    trends: List[np.ndarray] = field(default_factory=list)
    nfe: int = 0
    seconds: float = 0.0


def kernel_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """|K - K*| / |K*| of kernels (..., k, k) of any two odd sizes, the mean over channels."""
    size = max(found.shape[-1], true.shape[-1])
    same = [torch.nn.functional.pad(k, ((size - k.shape[-1]) // 2,) * 4) for k in (found, true)]
    return float(((same[0] - same[1]).flatten(-2).norm(dim=-1) / same[1].flatten(-2).norm(dim=-1)).mean())


def run_bird(cell: Cell, model: Any, images: Images, batch: int) -> Done:
    """Restore with BIR-D, ``batch`` images in one call of the network."""
    case, done = CASES[cell.case], Done(nfe=model.steps)
    names = images.names[: cell.images]
    for at in range(0, len(names), batch):
        part = names[at : at + batch]
        y = torch.cat([_unit(read_uint8(images.input(cell.case, name))) for name in part])
        masks = [images.known(cell.case, name) for name in part]
        known = None if masks[0] is None else torch.from_numpy(np.stack(masks)).float()[:, None]
        stage = model.options.first_stage
        first = None if stage is None else torch.cat([model.first_stage(n, y[i : i + 1]) for i, n in enumerate(part)])
        started = time.perf_counter()
        result = model.solve([y], part, known=known, first=first, seed=cell.seed)
        done.seconds += time.perf_counter() - started
        kernel = result.observations[0].degradation.kernel
        for i, name in enumerate(part):
            if result.failed[i] is not None:
                done.failed[name] = result.failed[i]
                continue
            done.images[name] = _bytes((result.image[i] + 1) / 2)
            if case.blur is not None and model.blur is None and model.settings.kernel.learns:
                done.kernel_error[name] = kernel_error(kernel[i, :, 0], known_kernel(case.blur)[0, :, 0])
        trace = result.trace  # rows as figure.TRENDS
        rows = [trace.sigma, *(torch.stack(v)[:, 0].nanmean(1).tolist() for v in (trace.scale, trace.mask_mean))]
        rows.append([float(k[0].mean()) for k in trace.kernel])
        rows.append([float(loss.mean()) for loss in trace.loss])
        done.trends.append(np.array(rows))
    return done


def run_classical(cell: Cell, images: Images) -> Done:
    """Restore a cell's images with one of scikit-image's systems."""
    case, done = CASES[cell.case], Done()
    function = CLASSICAL[cell.system][0] if cell.system != "input" else as_input
    for name in images.names[: cell.images]:
        y = read_uint8(images.input(cell.case, name)).astype(np.float64) / 255
        started = time.perf_counter()
        x = function(y, case, images.known(cell.case, name))
        done.seconds += time.perf_counter() - started
        done.images[name] = (np.clip(x, 0, 1) * 255).round().astype(np.uint8)
    return done


def consistency(image: np.ndarray, y: np.ndarray, case: Case, known: Optional[np.ndarray]) -> float:
    """Mean squared difference, in squared gray levels, between y and the result degraded truly, without noise.

    Only observed pixels count, and none of the border's that metrics leave out.
    """
    steps = chain([d for d in case.degradations if d["type"] not in ("noise", "holes")])
    again, _ = degrade(steps, image.astype(np.float32) / 255, np.random.default_rng(0))
    border = max(1, BORDER * len(again) // SIZE)
    inner = (slice(border, -border),) * 2
    error = np.square((again * 255).round() - y)[inner]
    return float(error.mean() if known is None else error[known[inner]].mean())


def mosaic(images: Sequence[np.ndarray]) -> np.ndarray:
    """The middles of images, as near a square as can be filled."""
    edge = (SIZE - NIQE_BLOCK) // 2
    middles = [image[edge : edge + NIQE_BLOCK, edge : edge + NIQE_BLOCK] for image in images]
    across = math.isqrt(len(middles))
    rows = [np.concatenate(middles[i : i + across], 1) for i in range(0, len(middles) - across + 1, across)]
    return np.concatenate(rows, 0)


def niqe(images: Sequence[np.ndarray]) -> Optional[float]:
    """NIQE of the :func:`mosaic`; None for less than four images."""
    from basicsr.metrics.niqe import calculate_niqe

    return float(calculate_niqe(mosaic(images), crop_border=0)) if len(images) >= 4 else None


def measure(cell: Cell, done: Done, images: Images, evaluation: Evaluation) -> tables.Results:
    """Measure a cell's results against the undegraded crops."""
    extra: Dict[str, Dict[str, float]] = {}
    for name, image in done.images.items():
        y, known = read_uint8(images.input(cell.case, name)).astype(np.float32), images.known(cell.case, name)
        evaluation.add(name, {"restored": image}, read_uint8(images.truth(name)))
        extra[name] = {"consistency": consistency(image, y, CASES[cell.case], known)}
        if name in done.kernel_error:
            extra[name]["kernel_error"] = done.kernel_error[name]
    for name, reason in done.failed.items():
        evaluation.fail(name, reason)
    results = evaluation.results()
    for row in results.rows:
        row["metrics"]["restored"].update(extra[row["image"]])
    if done.images:
        results.sets.setdefault("restored", {})["niqe"] = {"value": niqe(list(done.images.values()))}
    for name in ("niqe", "consistency", "kernel_error"):
        results.protocols[name] = {"name": COLUMNS[name][0], "type": f"study_{name}", "better": "lower"}
    return results


def fingerprint(cell: Cell, model: Any, images: Images) -> str:
    """What a cell's result depends on: settings, weights, images, degradation."""
    case = CASES[cell.case]
    settings = None if model is None else model.record_settings(seed=cell.seed)
    names = images.names[: cell.images]
    content = json.dumps([settings, names, asdict(case), cell.system, SIZE], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def run_cell(
    cell: Cell, images: Images, steps: int, batch: int, evaluation: Evaluation
) -> Tuple[tables.Results, Dict[str, Any], bool]:
    """A cell's measurements by an empty evaluation, and what is known of it; and whether it was restored now."""
    folder = os.path.join(images.folder, cell.folder)
    path = os.path.join(folder, "metrics.json")
    model = _load(cell, steps) if cell.system in SYSTEMS else None
    mark = fingerprint(cell, model, images)
    if os.path.isfile(path):
        results, about = tables.read_results(path)
        if about.get("fingerprint") == mark:
            return results, about, False
    done = run_classical(cell, images) if model is None else run_bird(cell, model, images, batch)
    for name, image in done.images.items():
        write_image(image, os.path.join(folder, name))
    if done.trends:
        buffer = io.BytesIO()
        steps = min(rows.shape[1] for rows in done.trends)  # a batch whose images have all failed ends early
        np.save(buffer, np.mean([rows[:, :steps] for rows in done.trends], 0))
        write_atomically(buffer.getvalue(), os.path.join(folder, "trends.npy"))
    results = measure(cell, done, images, evaluation)
    about = {
        "name": cell.label,
        "cell": json.loads(json.dumps(asdict(cell))),
        "fingerprint": mark,
        "seconds": round(done.seconds / (len(done.images) + len(done.failed)), 3),
        "nfe": done.nfe,
        "threads": torch.get_num_threads(),
    }
    write_atomically(json.dumps(tables.as_data(results, about), indent=1, allow_nan=False).encode(), path)
    return results, about, True
