"""FID and KID between two sets of images, on features of non-overlapping patches."""

from __future__ import annotations

from typing import Any, Optional, Sequence, Union

import numpy as np

from ucdir_plugin.metrics.features import extract, network_stamp
from ucdir_plugin.metrics.images import described, rgb
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import NotMeasurable, UserError, at_least_one

ENOUGH_FOR_FID = 2048
"""Patches below which FID comes with a warning."""

SETS = {"calculate_fid": "fid", "calculate_kid": "kid"}
"""Registered metrics that are of a set of images, not of one."""

Images = Union[np.ndarray, Sequence[np.ndarray]]


def frechet_distance(features: np.ndarray, features2: np.ndarray) -> float:
    """FID (Heusel et al., NeurIPS 2017): |mu - mu2|^2 + tr(C + C2 - 2 (C C2)^(1/2)), as clean-fid, in float64.

    C = A^T A with A = (features - mu) / sqrt(N - 1). The square root's trace is the sum of A A2^T's singular values:
    exact for singular covariances too, where clean-fid's matrix square root is not, and quick for few patches.

    Args:
        features, features2: (N, D) and (N2, D).

    Raises:
        NotMeasurable: for fewer than two patches in a set.
    """
    if min(len(features), len(features2)) < 2:
        raise NotMeasurable("FID needs two patches in each set")
    means, roots, traces = [], [], []
    for values in (features, features2):
        values = np.asarray(values, dtype=np.float64)
        means.append(values.mean(0))
        root = (values - means[-1]) / np.sqrt(len(values) - 1)
        traces.append((root**2).sum())
        # More patches than features: R of QR has the same R^T R in fewer rows.
        roots.append(np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root)
    square_root = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return max(0.0, float(((means[0] - means[1]) ** 2).sum() + traces[0] + traces[1] - 2 * square_root))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(
    features: np.ndarray, features2: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """KID (Binkowski et al., ICLR 2018): the unbiased squared MMD with k(x, y) = (x . y / D + 1)^3, as clean-fid.

    The mean over random subsets of ``subset_size``, or of the smaller set's size. Two sets of one size within
    ``subset_size`` are taken whole: all their subsets would be equal.

    Args:
        features, features2: (N, D) and (N2, D).
        seed: of the subsets; with ``np.random.seed(seed)`` clean-fid draws the same.

    Returns:
        around 0 for samples of one distribution, so that it may be below.

    Raises:
        NotMeasurable: for fewer than two patches in a set.
    """
    sets = [np.asarray(f, dtype=np.float64) for f in (features, features2)]
    m = min(len(sets[0]), len(sets[1]), subset_size)
    if m < 2:
        raise NotMeasurable("KID needs two patches in each set")
    if len(sets[0]) == len(sets[1]) == m:
        return float(_jackknife_sums(*sets, np.zeros(m, int))[0])
    draw, total = np.random.RandomState(seed), 0.0
    for _ in range(subsets):
        second, first = (s[draw.choice(len(s), m, replace=False)] for s in (sets[1], sets[0]))
        within = _kernel(first, first), _kernel(second, second)
        total += sum(k.sum() - np.trace(k) for k in within) / (m * (m - 1)) - 2 * _kernel(first, second).mean()
    return float(total / subsets)


def _jackknife_sums(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[float, np.ndarray]:
    """MMD^2 of the pairs (x, y), and of what is left of them without each of the ``groups`` (numbers from 0 on)."""
    order = np.argsort(groups, kind="stable")
    x, y, groups = x[order], y[order], groups[order]
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    sizes = np.diff(np.r_[starts, len(groups)])
    sums = []  # (G, G) sums of kernel values between groups, a block of rows at a time
    for a, b in ((x, x), (y, y), (x, y)):
        rows = []
        for start, size in zip(starts, sizes):
            block = np.zeros(len(b))
            for i in range(start, start + size, 512):
                k = _kernel(a[i : min(i + 512, start + size)], b)
                if a is b:
                    k[np.arange(len(k)), np.arange(i, i + len(k))] = 0
                block += k.sum(0)
            rows.append(np.add.reduceat(block, starts))
        sums.append(np.stack(rows))

    def without(totals: np.ndarray) -> np.ndarray:
        return totals.sum() - totals.sum(0) - totals.sum(1) + np.diag(totals)

    n, left = len(groups), len(groups) - sizes
    whole = (sums[0].sum() + sums[1].sum()) / (n * (n - 1)) - 2 * sums[2].sum() / n**2
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = (without(sums[0]) + without(sums[1])) / (left * (left - 1)) - 2 * without(sums[2]) / left**2
    return whole, rest


def kernel_distance_error(features: np.ndarray, features2: np.ndarray, groups: np.ndarray) -> Optional[float]:
    """Standard error of KID by the jackknife over ``groups`` of pairs of patches (those of one image are no strangers).

    sqrt((G - 1) / G sum_g (KID without g - mean)^2), of the whole set's KID, also where :func:`kernel_distance` takes
    subsets.

    Args:
        features, features2: (N, D), row i of both from one place.
        groups: (N,) which image a row is of; if there is but one, every row is a group.

    Returns:
        None where it cannot be known (fewer than three patches, or an image without which fewer than two are left).
    """
    groups = np.unique(groups, return_inverse=True)[1].ravel()
    if groups.max(initial=0) == 0:
        groups = np.arange(len(features))
    if len(features) < 3:
        return None
    _, rest = _jackknife_sums(*(np.asarray(f, dtype=np.float64) for f in (features, features2)), groups)
    return jackknife_error(rest) if np.isfinite(rest).all() else None


def jackknife_error(without: np.ndarray) -> float:
    """Standard error of a statistic from its values without each of n parts: sqrt((n - 1) / n sum (value - mean)^2)."""
    without = np.asarray(without, dtype=np.float64)
    return float(np.sqrt((len(without) - 1) / len(without) * ((without - without.mean()) ** 2).sum()))


def without_each(kind: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Optional[float]]:
    """FID or KID of all images but one, for each: what :func:`jackknife_error` of it, or of a difference, is made of.

    FID takes a decomposition for each image: seconds for hundreds of patches, long for many thousands.

    Args:
        kind, pairs: as of :func:`summary`.

    Returns:
        one value an image; None for an image without patches, or without which fewer than two are left.
    """
    used = [number for number, (a, _) in enumerate(pairs) if len(a)]
    result: list[Optional[float]] = [None] * len(pairs)
    if not used:
        return result
    sets = [np.concatenate(part) for part in zip(*(pairs[number] for number in used))]
    groups = np.repeat(np.arange(len(used)), [len(pairs[number][0]) for number in used])
    if kind == "kid":
        found = _jackknife_sums(*(part.astype(np.float64) for part in sets), groups)[1]
    else:
        rest = [groups != group for group in range(len(used))]
        found = [frechet_distance(*(part[keep] for part in sets)) if keep.sum() > 1 else np.nan for keep in rest]
    for number, value in zip(used, found):
        result[number] = float(value) if np.isfinite(value) else None
    return result


def cut(image: np.ndarray, patch_size: int, crop_border: int = 0) -> np.ndarray:
    """Non-overlapping square patches of an image, row by row from the top left; a rest at the far sides is left out.

    Args:
        image: (H, W, 3) or (H, W) BGR uint8.

    Returns:
        (N, patch_size, patch_size, 3) RGB uint8; N is 0 for an image smaller than a patch.
    """
    at_least_one(patch_size=patch_size)
    image = rgb(image, crop_border)
    p, rows, columns = patch_size, image.shape[0] // patch_size, image.shape[1] // patch_size
    patches = image[: rows * p, : columns * p].reshape(rows, p, columns, p, 3)
    return patches.transpose(0, 2, 1, 3, 4).reshape(-1, p, p, 3)


def patch_features(
    image: np.ndarray, network: str, patch_size: int, crop_border: int, weights_dir: Optional[str]
) -> np.ndarray:
    """(N, D) features of an image's patches; (0, 0) if it has none."""
    return extract(network, cut(image, patch_size, crop_border), weights_dir)


def summary(kind: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """FID or KID of images whose patches' features are given.

    Args:
        kind: 'fid' or 'kid'.
        pairs: for each image, features (n, D) of the result's patches and of the truth's; n may be 0.

    Returns:
        ``value`` (None with a ``reason`` where it cannot be measured), ``images`` and ``patches`` that count,
        ``left_out`` (images smaller than a patch), ``warnings``; for KID ``standard_error`` and ``error_over``
        (images or patches).
    """
    used = [(a, b) for a, b in pairs if len(a)]
    result: dict[str, Any] = {
        "value": None,
        "images": len(used),
        "patches": sum(len(a) for a, _ in used),
        "left_out": len(pairs) - len(used),
        "warnings": [],
    }
    if result["left_out"]:
        result["warnings"].append(f"{result['left_out']} images are smaller than a patch and left out")
    if result["patches"] < 2:
        return {**result, "reason": f"{kind.upper()} needs two patches, there is {result['patches'] or 'none'}"}
    sets = [np.concatenate(part) for part in zip(*used)]
    if kind == "fid":
        result["value"] = frechet_distance(*sets)
        if result["patches"] < ENOUGH_FOR_FID:
            result["warnings"].append(
                f"FID on {result['patches']} patches is biased upwards: it takes {ENOUGH_FOR_FID} or more, and is"
                " comparable only between sets of one size; KID has no such bias"
            )
    else:
        groups = np.repeat(np.arange(len(used)), [len(a) for a, _ in used])
        result["value"] = kernel_distance(*sets)
        result["standard_error"] = kernel_distance_error(*sets, groups)
        result["error_over"] = "images" if len(used) > 1 else "patches"
    return result


def summary_unpaired(kind: str, features: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> dict[str, Any]:
    """FID or KID of images against others, which are not their truths: :func:`summary` without an error of KID.

    Args:
        kind: 'fid' or 'kid'.
        features, reference: of each image's patches, (n, D); n may be 0.
    """
    used, others = ([f for f in part if len(f)] for part in (features, reference))
    patches, count = sum(map(len, used)), sum(map(len, others))
    left_out = len(features) - len(used)
    result = {"value": None, "images": len(used), "patches": patches, "left_out": left_out, "warnings": []}
    if left_out:
        result["warnings"].append(f"{left_out} images are smaller than a patch and left out")
    if min(patches, count) < 2:
        which = "results" if patches < 2 else "the reference"
        return {**result, "reason": f"{kind.upper()} needs two patches, of {which} there are fewer"}
    sets = np.concatenate(used), np.concatenate(others)
    result["value"] = frechet_distance(*sets) if kind == "fid" else kernel_distance(*sets)
    if kind == "fid" and min(patches, count) < ENOUGH_FOR_FID:
        result["warnings"].append(
            f"FID on {patches} patches against {count} is biased upwards: it takes {ENOUGH_FOR_FID} or more of each,"
            " and is comparable only between sets of one size; KID has no such bias"
        )
    return result


def _protocol(kind: str, network: str, patch_size: int, crop_border: int, weights_dir: Optional[str]) -> dict[str, Any]:
    at_least_one(patch_size=patch_size)
    found = network_stamp(network, weights_dir)
    return {
        "name": f"{kind.upper()} ({found['network'].split(' (')[0]})",
        "colour": "RGB",
        "range": "0 to 255",
        "crop_border": crop_border,
        "patches": f"{patch_size}x{patch_size}, not overlapping, resized as clean-fid does",
        **found,
    }


def _fid_protocol(network: str, patch_size: int, crop_border: int, weights_dir: Optional[str]) -> dict[str, Any]:
    return _protocol("fid", network, patch_size, crop_border, weights_dir)


def _kid_protocol(network: str, patch_size: int, crop_border: int, weights_dir: Optional[str]) -> dict[str, Any]:
    return {**_protocol("kid", network, patch_size, crop_border, weights_dir), "subsets": "100 of at most 1000, seed 0"}


def _of_images(
    kind: str, img: Images, img2: Images, network: str, patch_size: int, crop_border: int, weights_dir: Optional[str]
) -> float:
    pairs = []
    sets = [[images] if isinstance(images, np.ndarray) else list(images) for images in (img, img2)]
    if len(sets[0]) != len(sets[1]):
        raise UserError(f"{kind.upper()}: {len(sets[0])} results and {len(sets[1])} truths: the same number is needed")
    for pair in zip(*sets):
        pairs.append(tuple(patch_features(i, network, patch_size, crop_border, weights_dir) for i in pair))
        if len(pairs[-1][0]) != len(pairs[-1][1]):
            raise UserError(f"{kind.upper()}: a result and its truth must be of one size")
    result = summary(kind, pairs)
    if result["value"] is None:
        raise NotMeasurable(result["reason"])
    return result["value"]


@register("metric")
@described(_fid_protocol)
def calculate_fid(
    img: Images,
    img2: Images,
    network: str = "inception",
    patch_size: int = 256,
    crop_border: int = 0,
    weights_dir: Optional[str] = None,
    better: str = "lower",
) -> float:
    """FID of a set of images against the truths, on patches (UCDIR's protocol): :func:`frechet_distance`.

    In ``val: metrics:`` it is measured once for all images; this function does the same for given ones.

    Args:
        img, img2: one or several (H, W, 3) BGR uint8.
        network: inception (clean-fid's), efficientnet_lite0 (offline), or a name of :func:`.features.feature_network`.
        patch_size: side of the patches, pixels.
        crop_border: pixels left out on each side.
        weights_dir: where weights are looked for first.
        better: for BasicSR, which hands it over; changes nothing.

    Raises:
        NotAvailable: if the network cannot be had.
        NotMeasurable: for fewer than two patches.
        UserError: for sets that do not fit each other.
    """
    return _of_images("fid", img, img2, network, patch_size, crop_border, weights_dir)


@register("metric")
@described(_kid_protocol)
def calculate_kid(
    img: Images,
    img2: Images,
    network: str = "inception",
    patch_size: int = 256,
    crop_border: int = 0,
    weights_dir: Optional[str] = None,
    better: str = "lower",
) -> float:
    """KID of a set of images against the truths: :func:`kernel_distance`. Arguments as :func:`calculate_fid`.

    In ``val: metrics:`` it comes with its standard error (:func:`kernel_distance_error`).
    """
    return _of_images("kid", img, img2, network, patch_size, crop_border, weights_dir)
