"""What a step of BIR-D costs beside its network, and what it restores on photographs."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from ucdir_cli.benchmarks.timing import alternate, peak_memory, result

from ucdir_plugin.archs import ADMUNet
from ucdir_plugin.diffusion.bird.degradation import Degradation
from ucdir_plugin.diffusion.bird.solver import Solver
from ucdir_plugin.diffusion.bird.tasks import TASKS, preset
from ucdir_plugin.diffusion.noise import image_noise, normal
from ucdir_plugin.diffusion.prior import Prior
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.restoration.bird_options import known_kernel
from ucdir_plugin.utils import image_reading
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.zoo import priors

SMALL = {
    "image_size": 64,
    "num_channels": 64,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [16],
    "learn_sigma": True,
}
"""A small ADM network (its weights do not matter for the time)."""

BLURS = {
    "Gaussian 1.5": {"type": "gaussian", "sigma": 1.5},
    "Gaussian 2.5": {"type": "gaussian", "sigma": 2.5},
    "motion 9 at 0": {"type": "motion", "length": 9, "angle": 0},
    "motion 9 at 45": {"type": "motion", "length": 9, "angle": 45},
}

EXPOSURES = {"low light, gain 0.2": (0.2,), "HDR, gains 0.3, 3": (0.3, 3.0)}

NOISE = 2 / 255


def _small_prior() -> Prior:
    torch.manual_seed(0)
    return priors.network_prior(ADMUNet(**SMALL).eval().requires_grad_(False), NoiseSchedule.linear(1000, 1e-4, 0.02))


def _solver(name: str, prior: Prior, size: int) -> Solver:
    """A solver of the task blind at work on one image of noise."""
    settings = preset(name, "blind")
    if not prior.generates:
        settings = replace(settings, start="warm", steps=16)
    y = torch.tanh(normal((1, 3, size, size), "benchmark")) * 0.5
    return Solver(prior, [(y, TASKS["blind"].degradation(y, settings))], settings, image_noise(0, ["a"]), tile=2**30)


def _steps(name: str, prior: Prior, size: int) -> Dict[str, Callable[[], Any]]:
    """The network and the posterior's mean alone, on images of the size that the solver works on; and a whole step."""
    solver = _solver(name, prior, size)
    t = len(solver.schedule) // 2
    x_t = solver.first()

    def bare() -> None:
        x0, v = solver.predict(x_t, t)
        schedule = solver.schedule
        mean = float(schedule.posterior_mean_coef1[t]) * x0 + float(schedule.posterior_mean_coef2[t]) * x_t
        mean + (solver.log_variance(x_t, v, t) / 2).exp() * solver.noise(x_t.shape, 1)

    return {"bare": bare, "step": lambda: solver.step(1, x_t, t)}


def cost(size: int, repeats: int) -> List[dict]:
    """Seconds of a step beside its network's, for a small ADM and FFDNet; multiply-adds of the full ADM by count."""
    rows = []
    for title, prior in (("small ADM", _small_prior()), ("FFDNet", priors.load_ffdnet())):
        for name in ("guided", "default"):
            seconds = alternate(_steps(name, prior, size), repeats)
            rows.append(
                {
                    "prior": title,
                    "preset": name,
                    "size": size,
                    "bare s": round(seconds["bare"], 4),
                    "step s": round(seconds["step"], 4),
                    "ratio": round(seconds["step"] / seconds["bare"], 3),
                }
            )
    return [result("one step of BIR-D against its network and posterior alone", rows), _count(), _memory(size)]


def _count() -> dict:
    """The full 256x256 ADM on the meta device, and a data and kernel step of ``guided`` for it."""
    with torch.device("meta"):
        net = ADMUNet(image_size=256)
        x, t = torch.empty(1, 3, 256, 256), torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, t)
    network = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        settings = preset("guided", "blind")
        x = torch.zeros(1, 3, 256, 256)
        d = TASKS["blind"].degradation(x, settings)
        d.gradients(x, [x], ("x",))
        settings.kernel(x, [x], d, 0.1, 0.1)
    guidance = counter.get_total_flops()
    rows = [{"network GFLOPs": round(network / 1e9, 1), "guidance GFLOPs": round(guidance / 1e9, 3)}]
    rows[0]["ratio"] = round(1 + guidance / network, 5)
    return result("full ADM at 256x256, by count (meta device), preset guided", rows)


def _memory_case(what: str, name: str, size: int, tile: int) -> Callable[[], Any]:
    solver = _solver(name, priors.load_ffdnet(), size)
    solver.denoise = solver._tiled(tile, 32, 1, "drop")
    x_t, t = solver.first(), len(solver.schedule) // 2
    if what == "bare":
        return lambda: solver.predict(x_t, t)
    return lambda: solver.step(1, x_t, t)


def _memory(size: int) -> dict:
    """With the network on the whole image, and in patches, where what is left grows with the image alone."""
    rows = []
    side = 2 * size
    image = 3 * 4 * side**2 / 2**20
    for name, tile in (("guided", side + 64), ("default", side + 64), ("guided", 128), ("default", 128)):
        bare, step = (peak_memory(_memory_case, what, name, side, tile) for what in ("bare", "step"))
        rows.append(
            {
                "preset": name,
                "size": side,
                "patches": tile if tile < side else "whole",
                "network MB": round(bare, 1),
                "step MB": round(step, 1),
                "difference in images": round((step - bare) / image, 1),
            }
        )
    return result("peak memory of a step and of its network alone (FFDNet), in MB and image-sized tensors", rows)


def _crops(folder: str, count: int, size: int) -> Tuple[List[str], torch.Tensor]:
    """The first ``count`` images of a folder that are large enough: names, and centre crops (B, 3, size, size)."""
    names, crops = [], []
    for name in image_reading.list_images(folder, "--source"):
        image = image_reading.to_tensor(image_reading.read_photo(f"{folder}/{name}", 10**9))
        height, width = image.shape[-2:]
        if min(height, width) < size:
            continue
        top, left = (height - size) // 2, (width - size) // 2
        names.append(name)
        crops.append(image[..., top : top + size, left : left + size])
        if len(crops) == count:
            return names, torch.cat(crops)
    raise UserError(f"--source {folder}: {len(crops)} images of {size} pixels are there, {count} are wanted")


def _psnr(a: torch.Tensor, b: torch.Tensor) -> List[float]:
    """PSNR of 8-bit images, of each image; (B, 3, H, W) in [0, 1]."""
    error = ((a.clamp(0, 1) - b) * 255).round().square().flatten(1).mean(1)
    return (20 * math.log10(255) - 10 * error.clamp(min=1e-12).log10()).tolist()


def _eight_bits(y: torch.Tensor, names: List[str], key: int = 0) -> torch.Tensor:
    """What a camera makes of y: with noise, cut off, rounded."""
    y = y + NOISE * torch.stack([normal(y.shape[1:], key, name) for name in names])
    return (y.clamp(0, 1) * 255).round() / 255


def _exposures(truth: torch.Tensor, names: List[str], prior: Prior) -> List[Dict[str, Any]]:
    """Low light and HDR, in PSNR, and in PSNR after the one gain that fits best: how bright is not in the data."""

    def fitted(x: torch.Tensor) -> torch.Tensor:
        gain = (x * truth).flatten(1).sum(1) / x.square().flatten(1).sum(1)
        return x * gain.view(-1, 1, 1, 1)

    rows = []
    for title, gains in EXPOSURES.items():
        images = [_eight_bits((truth * gain).clamp(0, 1), names, i) for i, gain in enumerate(gains)]
        task = TASKS["lowlight" if len(gains) == 1 else "hdr"]
        settings = preset("default", "lowlight" if len(gains) == 1 else "hdr")
        observed = [image * 2 - 1 for image in images]
        pairs = list(zip(observed, task.degradations(observed, settings)))
        found = (Solver(prior, pairs, settings, image_noise(0, names)).run().image + 1) / 2
        row: Dict[str, Any] = {"exposures": title}
        for name, shown in (("best input", images), ("restored", [found])):
            plain = (statistics.mean(_psnr(image, truth)) for image in shown)
            even = (statistics.mean(_psnr(fitted(image.clamp(0, 1)), truth)) for image in shown)
            row[f"{name} dB"], row[f"{name}, gain fitted dB"] = round(max(plain), 2), round(max(even), 2)
        rows.append(row)
    return rows


def presets(folder: str, count: int, size: int, prior: str, names: Sequence[str]) -> List[dict]:
    """Blind deblurring of centre crops by several presets with one prior, which must generate images.

    Args:
        folder, count, size: as of :func:`quality`.
        names: of the presets.
    """
    keys, truth = _crops(folder, count, size)
    loaded = priors.load_prior(prior)
    rows = []
    for title, blur in BLURS.items():
        kernel = known_kernel(blur).expand(len(truth), -1, -1, -1, -1)
        y = _eight_bits(Degradation(kernel)(truth), keys)
        before = _psnr(y, truth)
        for name in names:
            settings = preset(name, "deblur")
            started = time.perf_counter()
            observed = y * 2 - 1
            start = TASKS["deblur"].degradation(observed, settings)
            found = Solver(loaded, [(observed, start)], settings, image_noise(0, keys)).run()
            seconds = time.perf_counter() - started
            whole = [i for i in range(count) if found.failed[i] is None]
            after = _psnr((found.image + 1) / 2, truth)
            rows.append(
                {
                    "blur": title,
                    "preset": name,
                    "input dB": round(statistics.mean(before), 2),
                    "restored dB": round(statistics.mean(after[i] for i in whole), 2) if whole else "-",
                    "below input": sum(after[i] < before[i] for i in whole),
                    "not finite": count - len(whole),
                    "s per image": round(seconds / count, 1),
                }
            )
    return [result(f"presets, prior {prior}, {count} crops {size}x{size} of {folder}, {keys[0]} first", rows)]


def quality(folder: str, count: int, size: int, prior: str = "ffdnet") -> List[dict]:
    """Blind deblurring of centre crops, the same with the kernel known, and other exposures.

    Args:
        folder: of photographs, subfolders too.
        count: of images, the first by name.
        size: of their crops.
    """
    names, truth = _crops(folder, count, size)
    loaded = priors.load_prior(prior)
    rows, worse, cases = [], 0, 0
    for title, blur in BLURS.items():
        kernel = known_kernel(blur).expand(len(truth), -1, -1, -1, -1)
        y = _eight_bits(Degradation(kernel)(truth), names)
        settings = preset("default", "blind")
        noise = partial(image_noise, 0, names)
        started = time.perf_counter()
        degradation = TASKS["blind"].degradation(y * 2 - 1, settings)
        blind = Solver(loaded, [(y * 2 - 1, degradation)], settings, noise()).run()
        seconds = time.perf_counter() - started
        known = replace(degradation, kernel=kernel.clone())
        with_k = Solver(loaded, [(y * 2 - 1, known)], settings.known(), noise()).run()
        before, after, best = (_psnr(x, truth) for x in (y, (blind.image + 1) / 2, (with_k.image + 1) / 2))
        gains = [b - a for a, b in zip(before, after)]
        worse, cases = worse + sum(g < 0 for g in gains), cases + len(gains)
        rows.append(
            {
                "blur": title,
                "input dB": round(statistics.mean(before), 2),
                "blind dB": round(statistics.mean(after), 2),
                "gain dB": round(statistics.mean(gains), 2),
                "least gain dB": round(min(gains), 2),
                "below input": sum(g < 0 for g in gains),
                "K known dB": round(statistics.mean(best), 2),
                "s per image": round(seconds / len(names), 2),
            }
        )
    title = (
        f"preset default, prior {prior}, {count} crops {size}x{size} of {folder}: {worse} of {cases} below the input"
    )
    exposures = f"preset default, prior {prior}, the same crops: low light and several exposures"
    return [result(title, rows), result(exposures, _exposures(truth, names, loaded))]
