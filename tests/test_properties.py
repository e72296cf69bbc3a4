"""What must hold for any input: schedules, samplers, tiling, degradations, padding, averages, metrics, option files.

Each property is tried on a few dozen cases, always the same; ``-m campaign`` tries the same properties on thousands.
"""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import torch
import yaml
from basicsr.models import build_model
from basicsr.utils.registry import METRIC_REGISTRY
from conftest import EDSR, ROOT, TINY, Workplace, merged
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ucdir_cli.command_line import parse_run_arguments

from ucdir_plugin.archs.padding import pad_to_multiple
from ucdir_plugin.data.loader import EndlessSampler, training_loader
from ucdir_plugin.diffusion import samplers, tiling
from ucdir_plugin.diffusion.bird.degradation import PADDINGS, Degradation, project_simplex
from ucdir_plugin.diffusion.bird.operators import BlockMean, ChannelMean, Compose, HoleMask, Operator
from ucdir_plugin.diffusion.schedule import SPACINGS, NoiseSchedule, diffuse
from ucdir_plugin.options.check import load_options
from ucdir_plugin.options.reading import read_options, read_yaml
from ucdir_plugin.options.schema import ScheduleOptions
from ucdir_plugin.registry import build_arch
from ucdir_plugin.training import setup
from ucdir_plugin.training.steps import update_average
from ucdir_plugin.utils import degradations as chains
from ucdir_plugin.utils.errors import UserError

QUICK, MANY = 40, 4000


def holds(many: int = MANY, quick: int = QUICK, **strategies: st.SearchStrategy) -> Callable:
    """A test that a function of these arguments raises nothing; under the marker campaign on ``many`` cases.

    pytest's fixtures may be among the function's other arguments.
    """

    def decorate(check: Callable) -> Callable:
        fixtures = [name for name in check.__code__.co_varnames[: check.__code__.co_argcount] if name not in strategies]

        @pytest.mark.parametrize("cases", [quick, pytest.param(many, marks=pytest.mark.campaign)])
        def test(cases: int, record_property: Callable, request: pytest.FixtureRequest) -> None:
            found = {name: request.getfixturevalue(name) for name in fixtures}
            count = [0]

            @settings(
                max_examples=cases,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(**strategies)
            def run(**case: Any) -> None:
                count[0] += 1
                check(**case, **found)

            run()
            if cases == many:
                record_property("cases", count[0])

        test.__doc__ = check.__doc__
        return test

    return decorate


def sides(least: int = 1, most: int = 40) -> st.SearchStrategy:
    return st.integers(least, most)


def images(height: int, width: int, seed: int, batch: int = 1, channels: int = 3) -> torch.Tensor:
    """(B, C, H, W) in [0, 1], float64: equalities hold to rounding."""
    return torch.rand(
        batch, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


SEEDS = st.integers(0, 2**32)

# Schedules


@st.composite
def schedules(draw, most: int = 3000) -> NoiseSchedule:
    """Any that options may give."""
    kind = draw(st.sampled_from(["linear", "cosine"]))
    steps = draw(st.one_of(st.integers(1, 5), st.integers(1, most)))
    betas = st.floats(-9, math.log10(0.999)).map(lambda power: 10**power)
    given = {"timesteps": steps, "type": kind}
    if kind == "linear":
        given.update(start=draw(betas), end=draw(betas))
    try:
        return ScheduleOptions(**given).schedule()
    except UserError as err:
        assert "take fewer steps or smaller betas" in str(err)
        assume(False)


@holds(schedule=schedules())
def test_schedule(schedule):
    """alpha_bar falls from below 1; the posterior is Bayes' rule; at t = 0 it is x_0."""
    bars, before = schedule.alpha_bar, schedule.alpha_bar_prev
    assert bars[-1] > 0 and bars[0] < 1 and (np.diff(bars) < 0).all()
    for name in (
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):
        assert np.isfinite(getattr(schedule, name)).all(), name
    rounding = 1e-14 / schedule.betas.min()  # of 1 - alpha_bar
    np.testing.assert_allclose(schedule.posterior_mean_coef1[0], 1, rtol=rounding)
    assert schedule.posterior_mean_coef2[0] == schedule.posterior_variance[0] == 0
    # The mean of q(x_{t-1} | x_t, x_0) at x_t = sqrt(alpha_bar) x_0 is sqrt(alpha_bar_prev) x_0: q's means agree.
    total = schedule.posterior_mean_coef1 + schedule.posterior_mean_coef2 * np.sqrt(bars)
    np.testing.assert_allclose(total, np.sqrt(before), rtol=rounding)
    # Precisions add: 1 / variance = alpha / beta + 1 / (1 - alpha_bar_prev)
    later = slice(1, None)
    precision = (1 - schedule.betas[later]) / schedule.betas[later] + 1 / (1 - before[later])
    np.testing.assert_allclose(schedule.posterior_variance[later] * precision, 1, rtol=rounding)
    assert (schedule.posterior_variance <= schedule.betas * (1 + rounding)).all()


@holds(schedule=schedules(), spacing=st.sampled_from(SPACINGS), share=st.floats(0, 1))
def test_respacing(schedule, spacing, share):
    """Kept levels are the schedule's own; the noisiest is always among them, the cleanest where the spacing says so."""
    steps = 1 + round(share * (len(schedule) - 1))
    short = schedule.respace(steps, spacing)
    assert len(short) == steps
    kept = np.searchsorted(-schedule.alpha_bar, -short.alpha_bar)
    np.testing.assert_array_equal(short.alpha_bar, schedule.alpha_bar[kept])
    assert (np.diff(kept) > 0).all() and kept[-1] == len(schedule) - 1
    assert kept[0] == 0 or steps == 1 or spacing == "trailing"


@holds(schedule=schedules(), seed=SEEDS)
def test_levels(schedule, seed):
    """Drawn levels and steps lie within the schedule; sigma, level and alpha_bar are each other's inverses."""
    stream = torch.Generator().manual_seed(seed)
    level = schedule.sample_level(stream)
    assert schedule.levels[-1] <= level <= 1
    t = schedule.sample_timestep(stream)
    sigma = (1 / schedule.alpha_bar[t] - 1) ** 0.5
    np.testing.assert_allclose(1 / (1 + sigma**2), schedule.alpha_bar[t], rtol=1e-12)
    np.testing.assert_allclose(schedule.levels[t + 1] ** 2, schedule.alpha_bar[t], rtol=1e-12)


DETERMINISTIC = [name for name in samplers.SAMPLERS if name not in ("ddpm", "dpmpp_2m_sde")]


@holds(
    many=2000,
    schedule=schedules(most=300),
    name=st.sampled_from(DETERMINISTIC),
    spacing=st.sampled_from(SPACINGS),
    share=st.floats(0, 0.2),
    seed=SEEDS,
)
def test_a_sampler_that_is_told_the_noise_returns_the_image(schedule, name, spacing, share, seed):
    """eps of a known x_0 at each level, whatever the sampler has made of x by then."""
    short = schedule.respace(1 + round(share * (len(schedule) - 1)), spacing)
    assume(short.alpha_bar[-1] > 1e-9)
    x0 = images(3, 4, seed) * 2 - 1

    def denoise(x, level):
        level = level.view(-1, 1, 1, 1)
        return (x - level * x0) / (1 - level.square()).sqrt()

    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = samplers.SAMPLERS[name].sample(denoise, short, lambda draw: noise)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-6)


# Tiling


@st.composite
def grids(draw) -> tuple[int, int, int, int, int, str]:
    stride = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    return (draw(sides(1, 90)), draw(sides(1, 90)), draw(sides(0, 64)), draw(st.integers(-1, 30)), stride, draw(st.sampled_from(["aligned", "released"])))  # fmt: skip


def grid_or_error(height, width, tile, overlap, stride, kind):
    """A grid, or None where a clear error says that there is none."""
    try:
        if kind == "aligned":
            return tiling.Grid.aligned(height, width, tile, overlap, stride)
        return tiling.Grid.released(height, width, tile, overlap)
    except UserError as err:
        assert "\n" not in str(err) and ("tile" in str(err) or "overlap" in str(err))
        needs = 2 * overlap >= tile or overlap < 0 or tile < stride
        assert needs or tile // stride <= -(-2 * overlap // stride), (tile, overlap, stride, kind)
        return None


@holds(parts=grids())
def test_each_pixel_is_kept_once(parts):
    height, width, tile = parts[:3]
    grid = grid_or_error(*parts)
    if grid is None:
        return
    count = np.zeros((height, width), int)
    computed = 0
    for row, column in grid.tiles:
        count[row.keep_start : row.keep_stop, column.keep_start : column.keep_stop] += 1
        computed += len(row) * len(column)
        assert 0 < len(row) <= tile and 0 < len(column) <= tile
    assert (count == 1).all()
    assert computed == round(grid.computed_ratio * height * width)


@holds(many=1500, parts=grids(), merge=st.sampled_from(tiling.MERGES), scale=st.integers(1, 3), batch=st.integers(1, 3), seed=SEEDS)  # fmt: skip
def test_tiled_identity_is_the_identity(parts, merge, scale, batch, seed):
    """Dropped or blended, enlarged or not: the weights of all patches add up to one at each pixel."""
    grid = grid_or_error(*parts)
    if grid is None:
        return
    image = images(*parts[:2], seed, batch=2)

    def enlarge(x):
        return x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)

    found = tiling.tiled(enlarge, grid, image, tile_batch=batch, merge=merge)
    torch.testing.assert_close(found, enlarge(image), rtol=0, atol=0 if merge == "drop" else 1e-12)


# Degradations


def operators(height: int, width: int, factor: int, seed: int) -> dict[str, Operator]:
    small = math.ceil(height / factor), math.ceil(width / factor)
    known = (images(*small, seed, 2, 1) > 0.3).double()
    known[..., 0, 0] = 1
    return {
        "identity": Operator(),
        "block mean": BlockMean(factor),
        "channel mean": ChannelMean(),
        "holes": HoleMask(known if factor == 1 else torch.ones(1, 1, height, width, dtype=torch.float64)),
        "all": Compose([BlockMean(factor), ChannelMean(), HoleMask(known)]),
        "none": Compose([]),
    }


@holds(
    many=3000,
    height=sides(1, 24), width=sides(1, 24), factor=st.integers(1, 4), half=st.integers(0, 4), mixing=st.booleans(),
    padding=st.sampled_from(PADDINGS), kind=st.sampled_from(sorted(operators(4, 4, 1, 0))), seed=SEEDS,
)  # fmt: skip
def test_adjoints(height, width, factor, half, mixing, padding, kind, seed):
    """<A x, y> = <x, A' y>, by automatic differentiation and by FFT, for any size and kernel; x shrinks as is said."""
    border = half if padding == "valid" else 0
    size = math.ceil(height / factor) * factor, math.ceil(width / factor) * factor
    operator = operators(*size, factor, seed)[kind]
    x = images(size[0] + 2 * border, size[1] + 2 * border, seed, 2)
    kernel = images(2 * half + 1, 2 * half + 1, seed + 1, 2, 9 if mixing else 3).view(
        2, 3, -1, 2 * half + 1, 2 * half + 1
    )
    degradation = Degradation(kernel, operator=operator, padding=padding)
    y = degradation(x)
    assert y.shape[-2:] == (size[0] // operator.shrinks, size[1] // operator.shrinks)
    v = images(*y.shape[-2:], seed + 2, 2, y.shape[1])
    if operator.observed(v) is not None:
        v = v * operator.observed(v)
    forward, adjoint = degradation.maps(x)
    torch.testing.assert_close(forward(x), y, rtol=1e-9, atol=1e-9)
    for back in (adjoint, degradation.adjoint(x)):
        torch.testing.assert_close((y * v).sum(), (x * back(v)).sum(), rtol=1e-9, atol=1e-9)


@holds(count=st.integers(1, 6), size=sides(1, 7), scale=st.floats(1e-3, 1e3), seed=SEEDS)
def test_projection_of_kernels(count, size, scale, seed):
    """On the simplex; what is there stays; nothing on it is nearer."""
    kernel = (images(size, size, seed, count).unsqueeze(2) - 0.5) * scale
    found = project_simplex(kernel)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum((-1, -2)), torch.ones(count, 3, 1, dtype=found.dtype))
    torch.testing.assert_close(project_simplex(found), found, rtol=1e-9, atol=1e-9)
    other = images(size, size, seed + 1, count).unsqueeze(2)
    other = other / other.sum((-1, -2), keepdim=True)
    assert ((kernel - found).square().sum((-1, -2)) <= (kernel - other).square().sum((-1, -2)) * (1 + 1e-9)).all()


def _values(kind: chains.Kind) -> st.SearchStrategy:
    def value(limits: tuple[float, float]) -> st.SearchStrategy:
        low, high = limits
        return st.integers(low, min(high, 70)) if isinstance(low, int) else st.floats(low, min(high, 30.0))

    return st.fixed_dictionaries({name: value(limits) for name, limits in kind.limits.items()})


@holds(
    many=3000,
    step=st.sampled_from(sorted(chains.KINDS)).flatmap(lambda name: st.tuples(st.just(name), _values(chains.KINDS[name]))),
    height=sides(1, 50), width=sides(1, 50), seed=SEEDS, level=st.sampled_from([None, 0.0, 1.0]),
)  # fmt: skip
def test_degradations_of_any_image(step, height, width, seed, level):
    """Finite (NaN in holes alone) float32 in [0, 1], of the size that is promised; the same again from the same seed."""
    name, values = step
    image = images(height, width, seed)[0].permute(1, 2, 0).float().numpy().copy()
    if level is not None:
        image[:] = level
    if name == "block_mean" and min(height, width) < values["factor"]:
        return
    before = image.copy()
    declared = chains.chain([{"type": name, **values}])
    found, again = (chains.degrade(declared, image, np.random.default_rng(seed))[0] for _ in range(2))
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(image, before)
    shrinks = chains.shrinks(declared)
    assert found.shape == (height // shrinks, width // shrinks, 3) and found.dtype == np.float32
    known = np.isfinite(found)
    if name == "holes":
        hidden = ~known[..., 0]
        assert (known.all(2) == known.any(2)).all() and hidden.sum() == round(values["share"] * height * width)
    else:
        assert known.all()
    assert (found[known] >= -1e-6).all() and (found[known] <= 1 + 1e-6).all()


@holds(
    height=sides(1, 30), width=sides(1, 30), ratio=st.floats(1, 300), electrons=st.floats(10, 1e5),
    read=st.floats(0, 50), row=st.floats(0, 5), bits=st.integers(1, 16), seed=SEEDS,
)  # fmt: skip
def test_low_light_of_any_sensor(height, width, ratio, electrons, read, row, bits, seed):
    image = images(height, width, seed)[0].permute(1, 2, 0).float().numpy()
    found = chains.low_light(image, ratio, electrons, read, row, bits, np.random.default_rng(seed))
    assert found.shape == image.shape and found.dtype == np.float32
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1


@holds(height=sides(), width=sides(), multiple=st.integers(1, 40), always=st.booleans(), seed=SEEDS)
def test_padding(height, width, multiple, always, seed):
    """The image in the corner of the next multiple, everything around it from the image."""
    image = images(height, width, seed, 2)
    found = pad_to_multiple(image, multiple, always)
    torch.testing.assert_close(found[..., :height, :width], image, rtol=0, atol=0)
    for side, padded in zip((height, width), found.shape[-2:]):
        assert padded % multiple == 0 or (not always and padded == side and side % multiple == 0)
        assert (side < padded <= side + multiple) if always or side % multiple else padded == side
    assert torch.isin(found, image).all()


# Averages


@holds(
    many=1000,
    decay=st.floats(0, 0.9999), start=st.integers(0, 6), seed=SEEDS, count=st.integers(1, 12),
)  # fmt: skip
def test_average(decay, start, seed, count):
    """A weighted mean of all weights so far, the first among them; a copy of the last until it starts."""
    stream = torch.Generator().manual_seed(seed)
    live, ema = torch.nn.Linear(2, 2).double(), torch.nn.Linear(2, 2).double()
    seen, shares = [ema.weight.detach().clone()], [1.0]
    for iteration in range(1, count + 1):
        with torch.no_grad():
            live.weight.copy_(torch.randn(2, 2, generator=stream, dtype=torch.float64))
        update_average(ema, live, iteration, start, decay)
        updates = iteration - start
        kept = min(decay, (1 + updates) / (10 + updates)) if updates > 0 else 0.0
        seen.append(live.weight.detach().clone())
        shares = [*(share * kept for share in shares), 1 - kept]
    assert sum(shares) == pytest.approx(1)
    torch.testing.assert_close(ema.weight, sum(w * share for w, share in zip(seen, shares)), rtol=1e-9, atol=1e-12)


# Metrics


@holds(many=1000, height=sides(11, 40), width=sides(11, 40), seed=SEEDS, border=st.integers(0, 2), flip=st.booleans())
def test_metrics(height, width, seed, border, flip):
    """PSNR and SSIM know no first and second image, nor a side; SSIM of an image with itself is 1."""
    assume(min(height, width) - 2 * border >= 11)
    first, second = (np.uint8(images(height, width, seed + i)[0].permute(1, 2, 0).numpy() * 255) for i in range(2))
    turned = (first[:, ::-1], second[:, ::-1]) if flip else (first[::-1], second[::-1])
    for name in ("calculate_psnr", "calculate_ssim"):
        metric = METRIC_REGISTRY.get(name)
        value = metric(first, second, crop_border=border)
        assert math.isfinite(value)
        assert metric(second, first, crop_border=border) == pytest.approx(value, rel=1e-9)
        assert metric(*turned, crop_border=border) == pytest.approx(value, rel=1e-9)
    assert METRIC_REGISTRY.get("calculate_ssim")(first, first, crop_border=border) == pytest.approx(1, abs=1e-9)
    assert METRIC_REGISTRY.get("calculate_psnr")(first, first, crop_border=border) == math.inf


@holds(height=sides(), width=sides(), seed=SEEDS, level=st.floats(1e-3, 1))
def test_diffusion_is_undone_by_its_noise(height, width, seed, level):
    x0 = images(height, width, seed, 2) * 2 - 1
    noise, levels = torch.randn_like(x0), torch.tensor([level, 1.0], dtype=torch.float64)
    x_t = diffuse(x0, levels, noise)
    torch.testing.assert_close(x_t[1], x0[1], rtol=0, atol=0)
    torch.testing.assert_close((x_t[0] - (1 - level**2) ** 0.5 * noise[0]) / level, x0[0], rtol=1e-9, atol=1e-9)


# Option files

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 10**12, -(10**30), 0.5, 1.5, 1e-9, 1e300, math.inf, -math.inf, math.nan]),
    st.sampled_from(["", "x", "1", "1e-4", "../x", "[x]", "int", "train", "reflect", "UCDIR", "SIDUNet", "L1Loss"]),
    st.text(max_size=4),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(st.lists(SCALARS, max_size=2), max_size=2),
    st.dictionaries(st.sampled_from(["type", "a", "lr", "x:y", 3, True]), SCALARS, max_size=2),
    st.sampled_from([{"type": "L1Loss"}, {"type": {"type": 3}}, {"type": "SIDUNet"}, {"type": "UCDIR"}]),
)
NAMES = st.one_of(
    st.sampled_from(["foo", "type", "lr", "[x]", "int", 3, True, "network_x", "_base_"]), st.text(max_size=5)
)


def places(node: Any, above: tuple = ()) -> Iterator[tuple]:
    """Paths of all that is in nested mappings and lists."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*above, key)
        yield from places(value, (*above, key))


def at(node: Any, path: tuple) -> Any:
    for key in path:
        node = node[key]
    return node


@st.composite
def mutations(draw, originals: st.SearchStrategy) -> Any:
    """Options with up to three things dropped, replaced, added, renamed, moved or exchanged."""
    opt = copy.deepcopy(draw(originals))
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        paths = list(places(opt))
        if not paths:
            break
        here, there = draw(st.sampled_from(paths)), draw(st.sampled_from(paths))
        parent, last = at(opt, here[:-1]), here[-1]
        what = draw(st.sampled_from(["drop", "replace", "replace", "add", "rename", "copy", "swap"]))
        apart = here[: len(there)] != there and there[: len(here)] != here
        if what == "drop":
            del parent[last]
        elif what == "replace":
            parent[last] = copy.deepcopy(draw(VALUES))
        elif what == "add" and isinstance(parent, dict):
            parent[draw(NAMES)] = copy.deepcopy(draw(VALUES))
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(NAMES)] = parent.pop(last)
        elif what == "copy" and apart:
            parent[last] = copy.deepcopy(at(opt, there))
        elif what == "swap" and apart:
            value = parent[last]
            parent[last] = at(opt, there)
            at(opt, there[:-1])[there[-1]] = value
    return opt


FILES = sorted((ROOT / "options").rglob("*.yml"))
SMALL = [
    merged(TINY, {"network_g": {"denoiser": {"conditions": {"quality": {"range": [5, 30], "drop": 0.1}}}}}),
    merged(TINY, {"engine": "mmengine", "mmengine": {"hooks": [{"type": "EMAHook"}], "visualizer": {"type": "Visualizer"}}}),
    {
        **{k: v for k, v in EDSR.items() if k not in ("path", "scale")},
        "datasets": {"train": TINY["datasets"]["train"]},
        "network_g": {"type": "SIDUNet", "width": 4, "levels": 2},
        "train": {
            "total_iter": 2,
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [1]},
            "pixel_opt": {"type": "L1Loss"},
        },
    },
    {
        "name": "prior",
        "model_type": "DiffusionPriorModel",
        "datasets": {"train": {"name": "t", "type": "CleanImageDataset", "dataroot_gt": "photos", "gt_size": 16}},
        "network_g": {
            "type": "ADMUNet", "image_size": 16, "num_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
            "attention_resolutions": [], "num_head_channels": 8, "learn_sigma": True,
        },
        "diffusion": {"type": "linear", "timesteps": 100, "start": 1e-3, "end": 0.1},
        "train": {
            "total_iter": 2,
            "diffusion_opt": {"type": "NoisePredictionLoss"},
            "variance_opt": {"type": "VariationalBoundLoss"},
            "optim_g": {"type": "AdamW", "lr": 1e-3},
        },
        "val": {"sampling": {"steps": 2}, "samples": 1},
    },
]  # fmt: skip


@pytest.fixture
def here(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory to load option files in."""
    monkeypatch.chdir(workplace.folder)
    return workplace.folder / "options.yml"


@functools.cache
def _options_of(file: Path) -> dict:
    return read_options(str(file))


def one_line(err: UserError) -> None:
    assert str(err) and "\n" not in str(err), str(err)


@holds(many=3000, quick=25, opt=mutations(st.sampled_from(FILES).map(_options_of)), is_train=st.booleans())
def test_changed_option_files_load_or_say_why(opt, is_train, here):
    here.write_text(yaml.safe_dump(opt), encoding="utf-8")
    try:
        assert isinstance(load_options(str(here), None, is_train), dict)
    except UserError as err:
        one_line(err)


def light(opt: dict) -> bool:
    """Whether the networks are small enough to be built here; those that cannot be built at all are."""
    if not opt.get("network_g"):
        return True
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build_arch(opt["network_g"]).parameters()) < 10**6
    except Exception:
        return "10000" not in str(opt["network_g"])


@holds(many=2000, quick=60, opt=mutations(st.sampled_from(SMALL)))
def test_options_that_load_train_or_say_why(opt, here):
    """From the file to the first training step, as tools/train.py goes."""
    here.write_text(yaml.safe_dump(opt), encoding="utf-8")
    try:
        opt = setup.setup(parse_run_arguments("", ["-opt", str(here)]), True)
        (train_set,) = setup.build_sets(opt, ("train",))
        setup.build_sets(opt, ("val",))
        data = {**opt["datasets"]["train"], "num_worker_per_gpu": 0}
        if not light(opt) or data["batch_size_per_gpu"] > 16 or opt["engine"] == "mmengine":
            return
        model = setup.build("model", build_model, opt)
        loader = training_loader(train_set, data, EndlessSampler(len(train_set), data["batch_size_per_gpu"], 0, 1, 0))
        with setup.first_step(True):
            model.update_learning_rate(1, opt["train"].get("warmup_iter", -1))
            model.feed_data(next(iter(loader)))
            model.optimize_parameters(1)
    except UserError as err:
        one_line(err)


SNIPPETS = [
    "!!float abc", "!!int x", "!!bool maybe", "!!timestamp 2001-13-45", "!!python/object/apply:os.system [ls]", "!!binary a",
    "&a [*a]", "&a {b: *a}", "*x", "[", "{", "? a", "{1: 2}", "{[1]: 2}", "<<: 3", "{<<: [3]}", "2001-01-01", "1_000", ".nan",
    ".inf", "'", "|\n a", "!!set {a}", "!!omap [a: 1]", "\x00", "é", "\t", "0b", "1:30", "- ", "# ", "---\n", "...\n", "%YAML 9",
]  # fmt: skip


@st.composite
def spoiled(draw) -> bytes:
    """An option file with bytes replaced, lost, or put between."""
    text = bytearray(draw(st.sampled_from(FILES)).read_bytes())
    for _ in range(draw(st.sampled_from([1, 1, 3, 9]))):
        at = draw(st.integers(0, len(text)))
        more = draw(st.one_of(st.binary(max_size=2), st.sampled_from(SNIPPETS).map(str.encode)))
        text[at : at + draw(st.sampled_from([0, 0, 1, 20]))] = more
    return bytes(text)


@holds(many=3000, content=spoiled())
def test_spoiled_files_load_or_say_why(content, here):
    (here.parent / "demo_ucdir.yml").write_bytes(FILES[0].read_bytes())  # what some name as _base_
    here.write_bytes(content)
    try:
        load_options(str(here))
    except UserError as err:
        one_line(err)


@holds(many=3000, text=st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=12), st.text("[]{}:,&*!|>'\"%@`#-? \n\tab1.", max_size=9)))  # fmt: skip
def test_values_of_the_command_line_are_read_or_named(text):
    try:
        read_yaml(text, "--force_yml")
    except UserError as err:
        one_line(err)
        assert "--force_yml" in str(err)


KEYS = sorted(
    {":".join(map(str, path)) for opt in SMALL for path in places(opt)} | {"a:b", "name", ":", "train:", "=", "x"}
)


@holds(
    many=3000, key=st.sampled_from(KEYS), value=st.one_of(st.sampled_from(SNIPPETS), VALUES.map(lambda v: yaml.safe_dump(v))),
    second=st.sampled_from(KEYS),
)  # fmt: skip
def test_overrides_load_or_say_why(key, value, second, here):
    here.write_text(yaml.safe_dump(SMALL[0]))
    try:
        load_options(str(here), [f"{key}={value}", f"{second}=~"])
    except UserError as err:
        one_line(err)
