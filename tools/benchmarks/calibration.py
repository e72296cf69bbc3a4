"""Does a UCDIR network sample what it was trained on? Where its results lose texture, and why.

For noise of standard deviation s on the residual r = truth - prediction, a perfect denoiser returns the mean of r given
r + s n. Whatever the data, then E|denoised|² + E|r - denoised|² = E|r|², in each band of frequencies too (the law of
total variance). A denoiser that returns less power than that gives samples that are too smooth: of an L1 loss, which
asks for the median, or of an image whose statistics differ from those of the crops that it was trained on.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from tqdm import tqdm
from ucdir_cli.benchmarks.restore import condition_of, validation_samples
from ucdir_cli.benchmarks.timing import result

from ucdir_plugin.diffusion import conditions
from ucdir_plugin.diffusion.noise import image_noise
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.options.check import load_options
from ucdir_plugin.restoration import sampling
from ucdir_plugin.restoration.load import load_model
from ucdir_plugin.restoration.network import NetworkRestorer
from ucdir_plugin.utils.errors import UserError

NOISE = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Standard deviations of the noise, of that of the residual."""

BANDS = {
    "1/32 to 1/16": (1 / 32, 1 / 16),
    "1/16 to 1/8": (1 / 16, 1 / 8),
    "1/8 to 1/4": (1 / 8, 1 / 4),
    "finest": (1 / 4, 1),
}
"""Octaves of spatial frequency, in cycles per pixel; the last has the corners of the spectrum in it."""


def band_power(x: torch.Tensor) -> torch.Tensor:
    """Power in each of :data:`BANDS` and, last, all of it: (B, C, H, W) -> (5,), sums of squares over the pixels."""
    spectrum = torch.fft.fft2(x.double(), norm="ortho").abs().square().sum((0, 1))
    vertical, horizontal = (torch.fft.fftfreq(n, dtype=torch.float64, device=x.device) for n in x.shape[-2:])
    radius = torch.hypot(vertical[:, None], horizontal[None])
    parts = [spectrum[(radius >= low) & (radius < high)].sum() for low, high in BANDS.values()]
    return torch.stack([*parts, spectrum.sum()])


def informative(schedule: NoiseSchedule, scaled: float) -> float:
    """Share of the training's levels at which signal / noise, in power, is between 0.1 and 10.

    Args:
        scaled: standard deviation of what is diffused.
    """
    ratio = schedule.alpha_bar / (1 - schedule.alpha_bar) * scaled**2
    return float(((ratio > 0.1) & (ratio < 10)).mean())


def _what(dataset: str, samples: List[Dict[str, Any]], model: NetworkRestorer) -> str:
    return f"{dataset}, {len(samples)} images, weights {model.about['weights']}"


def _crops(image: torch.Tensor, size: Optional[int]) -> torch.Tensor:
    """(1, 3, H, W) -> its crops side by side, (B, 3, size, size); itself if there is no size."""
    if size is None:
        return image
    patches = image.unfold(-2, size, size).unfold(-2, size, size)  # (1, 3, rows, columns, size, size)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous()


def _residuals(
    model: NetworkRestorer, samples: List[Dict[str, Any]], size: Optional[int]
) -> Iterator[Tuple[str, torch.Tensor, sampling.Conditioned]]:
    """Key, residual truth - prediction in [-1, 1] units, and the network at work on the images or on their crops."""
    for sample in samples:
        lq, gt = (_crops(sample[name][None].to(model.device) * 2 - 1, size) for name in ("lq", "gt"))
        values = {name: [value] * len(lq) for name, value in condition_of(model, sample).items()}
        condition = conditions.encode(model.conditions, values, len(lq))
        condition = None if condition is None else condition.to(model.device)
        images = sampling.Conditioned(model.net, lq, model.schedule, model.options, condition=condition)
        yield sample["key"], gt - images.initial, images


@torch.no_grad()
def denoising(opt: str, weights: Optional[str], crop: int) -> List[dict]:
    """Error and power of the denoised residual over that of the residual, of whole images and of crops.

    Args:
        opt: option file of a UCDIR network, with a validation or test set.
        weights: default: what the option file trained last.
        crop: size of the crops.

    Raises:
        UserError: for a network without diffusion, images smaller than a crop, or a residual of 0.
    """
    model = load_model(opt, weights)
    if not model.diffusion:
        raise UserError(f"{opt}: {type(model.net).__name__} restores in one pass: there is no denoiser to calibrate")
    model.options = model.options.model_copy(update={"border": 0, "tile": None})
    dataset, samples = validation_samples(load_options(opt, is_train=False), opt)
    for sample in samples:
        if min(sample["gt"].shape[-2:]) < crop:
            raise UserError(f"{sample['key']} is smaller than a crop of {crop}: give a smaller --size")
    power, pixels = torch.zeros(len(BANDS) + 1, dtype=torch.float64), 0
    for _, residual, _ in _residuals(model, samples, None):
        power += band_power(residual).cpu()
        pixels += residual.numel()
    deviation = float(power[-1] / pixels) ** 0.5
    if not deviation:
        raise UserError(f"{opt}: of {dataset} the prediction is the truth: there is no residual to calibrate on")
    scale, rows = model.net.residual_scale, []
    ways = {"whole images": None, f"crops of {crop}": crop}
    for way, size in ways.items():
        sums = torch.zeros(len(NOISE), 3, len(BANDS) + 1, dtype=torch.float64)
        for key, residual, images in tqdm(_residuals(model, samples, size), total=len(samples), disable=None):
            noise = image_noise(model.seed, [f"{key}/{i}" for i in range(len(residual))], model.device)
            for i, relative in enumerate(NOISE):
                sigma = relative * deviation * scale
                level = 1 / (1 + sigma**2) ** 0.5
                x_t = level * (scale * residual + sigma * noise(residual.shape, i))
                eps = images.denoiser(x_t, x_t.new_full((len(x_t),), level))
                denoised = (x_t / level - sigma * eps) / scale
                sums[i] += torch.stack([band_power(x).cpu() for x in (denoised - residual, denoised, residual)])
        for relative, (error, kept, of) in zip(NOISE, sums):
            row: Dict[str, Any] = {"on": way, "noise / residual": relative}
            for band, at in (("all", -1), ("finest", -2)):
                found = float(error[at] / of[at]), float(kept[at] / of[at])
                row.update({f"error, {band}": found[0], f"power, {band}": found[1], f"sum, {band}": sum(found)})
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    share = informative(model.schedule, deviation * scale)
    title = (
        f"denoised residual / residual, in power: {_what(dataset, samples, model)}; a sum below 1: too smooth."
        f" The residual's standard deviation is {deviation:.3f}: residual_scale {1 / deviation:.1f} would give it the"
        f" noise's (here it is {scale:g}; {share:.1%} of training levels lie between 10 dB of signal and of noise)"
    )
    return [result(title, rows)]


@torch.no_grad()
def texture(opt: str, weights: Optional[str]) -> List[dict]:
    """Power of input, initial prediction and sample over the truth's, by octave of frequency (luminance).

    Arguments as of :func:`denoising`.
    """
    model = load_model(opt, weights)
    dataset, samples = validation_samples(load_options(opt, is_train=False), opt)
    names = [
        "input",
        *(["initial prediction"] if model.diffusion and model.net.predictor is not None else []),
        "restored",
    ]
    sums: Dict[str, Any] = dict.fromkeys(["truth", *names], 0.0)
    for sample in tqdm(samples, disable=None):
        drawn = model.run(sample["lq"][None].clone(), sample["key"], condition=condition_of(model, sample))
        (restored,) = drawn.samples
        images = {"truth": sample["gt"][None], "input": sample["lq"][None], "restored": restored}
        if len(names) == 3:
            images["initial prediction"] = drawn.initial()
        for name, image in images.items():
            gray = (image.cpu() * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
            sums[name] = sums[name] + band_power(gray).numpy()
    rows = []
    for name in names:
        ratios = np.round(sums[name] / sums["truth"], 3)
        rows.append({"image": name, **{band: float(ratio) for band, ratio in zip(BANDS, ratios)}})
    title = f"power over the truth's, by cycles per pixel: {_what(dataset, samples, model)}"
    return [result(title, rows)]
