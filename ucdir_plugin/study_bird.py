"""BIR-D's claims, checked: every system on the same degraded images, cell by cell; what tools/study_bird.py runs.

A cell is one system on one case with one seed. Its folder has the restored images and metrics.json (report.as_data),
which says what made it; a run goes on with the cells that are missing or were made otherwise.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from skimage import exposure, filters, restoration, transform
from tqdm import tqdm

from ucdir_plugin import imageio, report, restorer
from ucdir_plugin.blind import known_kernel
from ucdir_plugin.data.degradations import chain, degrade
from ucdir_plugin.diffusion.noise import key_to_seed
from ucdir_plugin.errors import UserError, did_you_mean
from ucdir_plugin.evaluation import Evaluation
from ucdir_plugin.files import write_atomically
from ucdir_plugin.folders import read_uint8
from ucdir_plugin.validation import write_image

SIZE = 128
"""Side of the centre crops."""

BORDER = 4
"""Pixels that no metric sees, as in the paper's tables."""

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
class Case:
    """A degradation, and what BIR-D is told of it.

    Attributes:
        title: in tables.
        task: of ``diffusion.tasks.TASKS``.
        degradations: as of ``data.degradations.chain``; noise is among them.
        blur: the true one, for the systems that know it, and the kernel's error.
        noise: of the input, of 255, as the solver is told.
    """

    title: str
    task: str
    degradations: Tuple[Mapping[str, Any], ...]
    blur: Optional[Mapping[str, Any]] = None
    noise: float = 2.0


def _noise(sigma: float = 2.0) -> Dict[str, Any]:
    return {"type": "noise", "sigma": sigma}


def _gaussian(sigma: float, noise: float = 2.0) -> Case:
    title = f"Gaussian blur {sigma}" + (f" and noise {noise:g}" if noise != 2 else "")
    chained = ({"type": "blur", "sigma": sigma}, _noise(noise))
    return Case(title, "deblur", chained, {"type": "gaussian", "sigma": sigma}, noise)


_MOTION = {"length": 9, "angle": 45}

CASES: Dict[str, Case] = {
    "gaussian1.5": _gaussian(1.5),
    "gaussian2.5": _gaussian(2.5),
    "motion": Case(
        "motion blur 9 at 45 degrees",
        "motion",
        ({"type": "motion_blur", **_MOTION}, _noise()),
        {"type": "motion", **_MOTION},
    ),
    "sr4": Case("means of 4x4 pixels", "sr4", ({"type": "block_mean", "factor": 4}, _noise())),
    "holes": Case("25 % holes of 8x8", "inpaint", (_noise(), {"type": "holes", "share": 0.25, "size": 8})),
    "gray": Case("mean of the channels", "colorize", ({"type": "channel_mean"},), noise=1.0),
    "lowlight": Case("a fifth of the light", "lowlight", ({"type": "exposure", "gain": 0.2}, _noise())),
    "noisyblur": _gaussian(1.5, 10.0),
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
        changes = json.dumps([self.bird, self.settings], sort_keys=True)
        mark = "" if changes == "[[], []]" else f"_{hashlib.sha256(changes.encode()).hexdigest()[:8]}"
        prior = f"_{os.path.splitext(os.path.basename(self.prior))[0]}" if self.prior else ""
        return os.path.join("cells", self.case, f"{self.system}{prior}{mark}_n{self.images}_seed{self.seed}")


# Systems


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

Classical = Callable[[np.ndarray, Case, Optional[np.ndarray]], np.ndarray]


def _channels(function: Callable[[np.ndarray], np.ndarray], y: np.ndarray) -> np.ndarray:
    return np.stack([function(y[..., c]) for c in range(y.shape[2])], 2)


@cache
def _psf(kind: str, **values: float) -> np.ndarray:
    return known_kernel({"type": kind, **values})[0, 0, 0].numpy()[::-1, ::-1].astype(np.float64)


def _true_psf(case: Case) -> np.ndarray:
    return _psf(case.blur["type"], **{k: v for k, v in case.blur.items() if k != "type"})


def _padded(function: Callable[[np.ndarray], np.ndarray], y: np.ndarray, width: int = 16) -> np.ndarray:
    """Of an image mirrored beyond its border: what works with Fourier transforms rings there else."""
    bigger = np.pad(y, ((width, width), (width, width), (0, 0)), mode="reflect")
    return _channels(function, bigger)[width:-width, width:-width]


def _richardson_lucy(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    turns = 20 if case.noise < 5 else 5  # more of them restore the noise
    return _padded(lambda c: restoration.richardson_lucy(c, _true_psf(case), num_iter=turns), y)


def _wiener(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    return _padded(lambda c: restoration.unsupervised_wiener(c, _true_psf(case), rng=rng)[0], y)


def _unsharp(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    return filters.unsharp_mask(y, radius=3, amount=0.5, channel_axis=2)


def _bicubic(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    return transform.resize(y, (SIZE, SIZE), order=3, mode="reflect", anti_aliasing=False)


def _biharmonic(y: np.ndarray, case: Case, known: Optional[np.ndarray]) -> np.ndarray:
    return restoration.inpaint_biharmonic(y, ~known, channel_axis=2)


def _gamma(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    return exposure.adjust_gamma(y, math.log(0.4) / math.log(min(max(float(y.mean()), 1e-3), 0.99)))


def _clahe(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    return exposure.equalize_adapthist(y)


CLASSICAL: Dict[str, Tuple[Classical, Tuple[str, ...]]] = {
    "unsharp mask": (_unsharp, ("deblur", "motion")),
    "Richardson-Lucy, true kernel": (_richardson_lucy, ("deblur", "motion")),
    "Wiener, true kernel": (_wiener, ("deblur", "motion")),
    "bicubic": (_bicubic, ("sr4",)),
    "biharmonic": (_biharmonic, ("inpaint",)),
    "gamma": (_gamma, ("lowlight",)),
    "CLAHE": (_clahe, ("lowlight",)),
}
"""scikit-image's: (function of y (h, w, 3) in [0, 1], case, known pixels), tasks. Constants: the best of a few on other
images than those of the study."""


def applies(system: str, case: Case) -> bool:
    """Whether a system restores such a case: models that learn no kernel are told one, or are not run."""
    if system in CLASSICAL:
        return case.task in CLASSICAL[system][1]
    if system == "known":
        return case.blur is not None
    return True


# What is restored


@dataclass
class Images:
    """The study's images on the disk, 8-bit PNGs: ``truth``, ``inputs/CASE`` and ``masks/CASE`` (white: holes)."""

    folder: str
    names: List[str]

    def truth(self, name: str) -> str:
        return os.path.join(self.folder, "truth", name)

    def input(self, case: str, name: str) -> str:
        return os.path.join(self.folder, "inputs", case, name)

    def known(self, case: str, name: str) -> Optional[np.ndarray]:
        """(H, W) bool."""
        if CASES[case].task != "inpaint":
            return None
        return read_uint8(os.path.join(self.folder, "masks", case, name))[..., 0] == 0


def chosen(source: str, only: Optional[str], without: Optional[str]) -> List[str]:
    """Images of a folder, by the names without extension that two text files list, one a line.

    Raises:
        UserError: for a missing file, or a name that is not in the folder.
    """
    names = {os.path.splitext(name)[0]: name for name in imageio.list_images(source, "--source")}

    def listed(path: str) -> List[str]:
        try:
            with open(path, encoding="utf-8") as file:
                found = file.read().split()
        except (OSError, UnicodeDecodeError) as err:
            raise UserError(f"{path} cannot be read: {getattr(err, 'strerror', None) or 'it is no text'}") from err
        for name in found:
            if name not in names:
                raise UserError(f"{path}: {name} is not in {source}; {did_you_mean(name, names)}")
        return found

    left = sorted(set(listed(only)) if only else names, key=str)
    gone = set(listed(without)) if without else set()
    return [names[stem] for stem in left if stem not in gone]


def prepare(source: str, names: Sequence[str], folder: str, cases: Iterable[str]) -> Images:
    """Centre crops and their degraded images, each a function of its name; what is there already is kept.

    Raises:
        UserError: for images smaller than the crop.
    """
    images = Images(folder, [f"{os.path.splitext(name)[0].replace('/', '_')}.png" for name in names])
    for name, target in zip(names, images.names):
        if not os.path.isfile(images.truth(target)):
            photo = read_uint8(os.path.join(source, name))
            top, left = ((side - SIZE) // 2 for side in photo.shape[:2])
            if min(top, left) < 0:
                raise UserError(f"{os.path.join(source, name)} is smaller than {SIZE}x{SIZE}; leave it out")
            write_image(photo[top : top + SIZE, left : left + SIZE], images.truth(target))
    for case in cases:
        steps = chain(CASES[case].degradations)
        for name in images.names:
            if os.path.isfile(images.input(case, name)):
                continue
            truth = read_uint8(images.truth(name)).astype(np.float32) / 255
            y, _ = degrade(steps, truth, np.random.default_rng(key_to_seed(0, "degradation", name)))
            known = np.isfinite(y[..., 0])
            if CASES[case].task == "inpaint":
                mask = np.where(known, 0, 255).astype(np.uint8)
                write_image(mask, os.path.join(folder, "masks", case, name))
            write_image((np.nan_to_num(y).clip(0, 1) * 255).round().astype(np.uint8), images.input(case, name))
    return images


# Restoring and measuring


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
    return restorer.load_model("bird", device="cpu", bird=keys, sampling=settings)


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
        trace = result.trace
        rows = [trace.sigma, *(torch.stack(v)[:, 0].nanmean(1).tolist() for v in (trace.scale, trace.mask_mean))]
        rows.append([float(k[0].mean()) for k in trace.kernel])
        done.trends.append(np.array(rows))
    return done


def run_classical(cell: Cell, images: Images) -> Done:
    case, done = CASES[cell.case], Done()
    function = CLASSICAL[cell.system][0] if cell.system != "input" else _as_input
    for name in images.names[: cell.images]:
        y = read_uint8(images.input(cell.case, name)).astype(np.float64) / 255
        started = time.perf_counter()
        x = function(y, case, images.known(cell.case, name))
        done.seconds += time.perf_counter() - started
        done.images[name] = (np.clip(x, 0, 1) * 255).round().astype(np.uint8)
    return done


def _as_input(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    """The input itself; of the small images of sr4 the nearest pixel."""
    return y if y.shape[:2] == (SIZE, SIZE) else y.repeat(SIZE // len(y), 0).repeat(SIZE // len(y), 1)


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
    """Of the :func:`mosaic`; None for less than four images."""
    from basicsr.metrics.niqe import calculate_niqe

    return float(calculate_niqe(mosaic(images), crop_border=0)) if len(images) >= 4 else None


def measure(cell: Cell, done: Done, images: Images, evaluation: Evaluation) -> report.Results:
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
    told = None if model is None else model.record_settings(seed=cell.seed)
    names = images.names[: cell.images]
    content = json.dumps([told, names, asdict(case), cell.system, SIZE], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def run_cell(
    cell: Cell, images: Images, steps: int, batch: int, evaluation: Evaluation
) -> Tuple[report.Results, Dict[str, Any], bool]:
    """A cell's measurements by an empty evaluation, and what is known of it; and whether it was restored now."""
    folder = os.path.join(images.folder, cell.folder)
    path = os.path.join(folder, "metrics.json")
    model = _load(cell, steps) if cell.system in SYSTEMS else None
    mark = fingerprint(cell, model, images)
    if os.path.isfile(path):
        results, about = report.read_results(path)
        if about.get("fingerprint") == mark:
            return results, about, False
    done = run_classical(cell, images) if model is None else run_bird(cell, model, images, batch)
    for name, image in done.images.items():
        write_image(image, os.path.join(folder, name))
    if done.trends:
        buffer = io.BytesIO()
        np.save(buffer, np.mean(done.trends, 0))
        write_atomically(buffer.getvalue(), os.path.join(folder, "trends.npy"))
    results = measure(cell, done, images, evaluation)
    about = {
        "name": cell.label,
        "cell": json.loads(json.dumps(asdict(cell))),
        "fingerprint": mark,
        "seconds": round(done.seconds / max(1, len(done.images)), 3),
        "nfe": done.nfe,
        "threads": torch.get_num_threads(),
    }
    write_atomically(json.dumps(report.as_data(results, about), indent=1, allow_nan=False).encode(), path)
    return results, about, True


# The parts of the study


def main_part(priors: Sequence[str], cases: Sequence[str], images: int) -> List[Cell]:
    """Every system on every case."""
    cells = []
    for case in cases:
        cells += [Cell(case, name, images=images) for name in ("input", *CLASSICAL) if _runs(name, case)]
        for prior in priors:
            for system in SYSTEMS:
                if _runs(system, case) and (prior != "ffdnet" or system not in GENERATING):
                    cells.append(Cell(case, system, prior, images=images))
    return cells


def _runs(system: str, case: str) -> bool:
    return system == "input" or applies(system, CASES[case])


def seeds_part(priors: Sequence[str], cases: Sequence[str], images: int, seeds: int) -> List[Cell]:
    """Blur, holes and low light on all images, several seeds."""
    cells = []
    for case in (c for c in ("gaussian2.5", "holes", "lowlight") if c in cases):
        cells.append(Cell(case, "input", images=images))
        cells += [Cell(case, name, images=images) for name in CLASSICAL if _runs(name, case)]
        for prior in priors:
            systems = ("default",) if prior == "ffdnet" else ("gdp", "C", "BIR-D (paper)", "default")
            cells += [Cell(case, s, prior, seed, images=images) for s in systems for seed in range(seeds)]
    return cells


def sizes_part(priors: Sequence[str], cases: Sequence[str], images: int) -> List[Cell]:
    """The kernel's size against the true one (Tables 6 and 7)."""
    cells = []
    for case in (c for c in ("gaussian1.5", "motion", "lowlight", "sr4") if c in cases):
        for prior in priors:
            for system in ("default",) if prior == "ffdnet" else ("default", "guided"):
                for size in (1, 3, 5, 7, 9, 15, 21):
                    cells.append(Cell(case, system, prior, settings=(("kernel_size", size),), images=images))
    return cells


def first_part(priors: Sequence[str], cases: Sequence[str], images: int, folder: str) -> List[Cell]:
    """A first stage on and off, for random and for biased starts of the kernel (Table 8).

    It is ``default`` with FFDNet; what it restored is the start, the target, or both, of the second stage.
    """
    cells = []
    for case in (c for c in ("gaussian2.5",) if c in cases):
        stage = Cell(case, "default", "ffdnet", images=images)
        cells.append(stage)
        for prior in (p for p in priors if p != "ffdnet"):
            for start in ("random", "gaussian"):
                for use in (None, "start", "target", "both"):
                    first = {"images": os.path.join(folder, stage.folder), "use": use}
                    keys = (("first_stage", first),) if use else ()
                    changed = (("kernel_start", start), *((("start", "warm"),) if use in ("start", "both") else ()))
                    cells.append(Cell(case, "guided", prior, bird=keys, settings=changed, images=images))
    return cells


PARTS = ("main", "seeds", "sizes", "first")


def cells_of(part: str, priors: Sequence[str], cases: Sequence[str], count: int, total: int, seeds: int, folder: str):
    """
    Raises:
        UserError: for an unknown part.
    """
    if part not in PARTS:
        raise UserError(f"there is no part {part!r}; {did_you_mean(part, PARTS)}")
    if part == "main":
        return main_part(priors, cases, count)
    if part == "seeds":
        return seeds_part(priors, cases, total, seeds)
    return sizes_part(priors, cases, count) if part == "sizes" else first_part(priors, cases, count, folder)


# Tables


Measured = Tuple[Cell, report.Results, Dict[str, Any]]


def _mean(values: Sequence[Optional[float]]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def rows_of(measured: Sequence[Measured]) -> List[Dict[str, Any]]:
    """A row for each system of one case: means over the images and seeds, and their deviation between the seeds."""
    groups: Dict[str, List[Measured]] = {}
    for item in measured:
        groups.setdefault(item[0].label, []).append(item)
    inputs = groups["input"][0][1].rows if "input" in groups else []
    base = {r["image"]: r["metrics"]["restored"].get("psnr") for r in inputs}
    rows = []
    for label, items in groups.items():
        row: Dict[str, Any] = {"system": label, "seeds": len(items)}
        for name in COLUMNS:
            means = [results.summary().get("restored", {}).get(name) for _, results, _ in items]
            row[name] = _mean(means)
            if len(items) > 1 and None not in means:
                row[f"{name}_sd"] = statistics.stdev(means)
        below = [
            value < base[r["image"]]
            for _, results, _ in items
            for r in results.rows
            if (value := r["metrics"]["restored"].get("psnr")) is not None and base.get(r["image"]) is not None
        ]
        row["below"] = f"{sum(below)} of {len(below)}" if below and label != "input" else ""
        row["failed"] = sum(len(results.failed) for _, results, _ in items)
        row["seconds"], row["nfe"] = _mean([about["seconds"] for *_, about in items]), items[0][2]["nfe"]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; columns that nobody has a value in are left out."""
    shown = {n: c for n, c in COLUMNS.items() if any(r[n] is not None for r in rows)}
    failed = any(r["failed"] for r in rows)
    heads = ["system", *(title for title, _ in shown.values()), "below input"]
    heads += [*(["failed"] if failed else []), "s", "NFE"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        cells = [r["system"]]
        for name, (_, digits) in shown.items():
            text = "" if r[name] is None else f"{r[name]:.{digits}f}"
            cells.append(text + (f" ± {r[f'{name}_sd']:.{digits}f}" if f"{name}_sd" in r else ""))
        cells += [r["below"], *([str(r["failed"])] if failed else []), f"{r['seconds']:.2f}", str(r["nfe"] or "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_study(parts: Mapping[str, Sequence[Measured]], path: str, head: str) -> None:
    """All tables in one Markdown file."""
    titles = {
        "main": "All systems",
        "seeds": "All images, several seeds (mean ± deviation between seeds)",
        "sizes": "Size of the kernel",
        "first": "First stage",
    }
    text = [head]
    for part, measured in parts.items():
        text.append(f"## {titles[part]}")
        for case in dict.fromkeys(cell.case for cell, *_ in measured):
            rows = rows_of([item for item in measured if item[0].case == case])
            text += [f"### {CASES[case].title}", table(rows)]
    report.write_text("\n\n".join(text) + "\n", path)


def pictures(parts: Mapping[str, Sequence[Measured]], images: Images, names: Sequence[str]) -> List[str]:
    """For each case a picture: for each image a row of truth and what every system of the part main made of it."""
    written = []
    cases: Dict[str, List[Cell]] = {}
    for cell, *_ in parts.get("main", ()):
        cases.setdefault(cell.case, []).append(cell)
    for case, cells in cases.items():
        rows = []
        for name in names:
            files = [images.truth(name), *(os.path.join(images.folder, cell.folder, name) for cell in cells)]
            blank = np.full((SIZE, SIZE, 3), 255, np.uint8)
            rows.append(report.side_by_side([read_uint8(f) if os.path.isfile(f) else blank for f in files], 4))
        path = os.path.join(images.folder, "pictures", f"{case}.png")
        gap = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
        write_image(np.concatenate([p for row in rows for p in (row, gap)][:-1], 0), path)
        legend = "\n".join(["truth", *(cell.label for cell in cells)])
        report.write_text(legend + "\n", os.path.join(images.folder, "pictures", f"{case}.txt"))
        written.append(path)
    return written


def study(
    source: str,
    output: str,
    *,
    parts: Sequence[str] = ("main",),
    priors: Sequence[str] = ("ffdnet",),
    cases: Sequence[str] = tuple(CASES),
    only: Optional[str] = None,
    without: Optional[str] = None,
    count: int = 16,
    steps: int = 100,
    seeds: int = 3,
    batch: int = 16,
    say: Callable[[str], None] = print,
) -> str:
    """Run what is missing, write the tables; returns the path of the Markdown file.

    Args:
        source: folder of photographs.
        output: folder for everything.
        only, without: text files of names, see :func:`chosen`.
        count: images of all parts but ``seeds``, evenly among all.
        steps: of the systems that start from noise.
        say: called with a line for each cell that was run.

    Raises:
        UserError: for wrong names, or too few images.
    """
    for case in cases:
        if case not in CASES:
            raise UserError(f"there is no case {case!r}; {did_you_mean(case, CASES)}")
    found = chosen(source, only, without)
    if len(found) < count:
        raise UserError(f"{source}: {len(found)} images are there, {count} are wanted (--images)")
    evenly = [found[i * len(found) // count] for i in range(count)]
    ordered = evenly + [name for name in found if name not in evenly]
    total = len(ordered) if "seeds" in parts else count
    images = prepare(source, ordered[:total], output, cases)
    measured: Dict[str, List[Measured]] = {}
    evaluation = Evaluation(METRICS)
    planned = {part: cells_of(part, priors, cases, count, total, seeds, output) for part in parts}
    bar = tqdm(total=sum(map(len, planned.values())), unit="cell", disable=None)
    for part, cells in planned.items():
        for cell in cells:
            results, about, now = run_cell(cell, images, steps, batch, evaluation.empty())
            measured.setdefault(part, []).append((cell, results, about))
            bar.update()
            if now:
                psnr = results.summary().get("restored", {}).get("psnr")
                value = "all failed" if psnr is None else f"{psnr:.2f} dB"
                say(f"{cell.case}: {cell.label}, seed {cell.seed}: {value}, {about['seconds']:.2f} s per image")
    bar.close()
    head = f"{count} centre crops of {SIZE}x{SIZE} pixels; systems that start from noise: {steps} steps."
    head = f"# Tables of tools/study_bird.py\n\n{head}"
    path = os.path.join(output, "study.md")
    write_study(measured, path, head)
    for picture in pictures(measured, images, images.names[: min(4, count)]):
        say(f"picture: {picture}")
    return path
