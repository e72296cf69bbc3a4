"""Measuring a set of images: every metric of ``val: metrics:``, of one image or of all, with its protocol.

Images come one at a time and are not kept; of FID and KID the patches' features are.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from typing import Any, Callable, Mapping, Optional, Sequence

import numpy as np

from ucdir_plugin.compat import calculate_metric, get_root_logger
from ucdir_plugin.evaluation import tables
from ucdir_plugin.metrics import distances, protocol
from ucdir_plugin.metrics.consistency import OWN
from ucdir_plugin.registry import DATASET_REGISTRY, METRIC_REGISTRY
from ucdir_plugin.utils.errors import NotAvailable, NotMeasurable, UserError, named
from ucdir_plugin.utils.image_reading import list_images, read_uint8
from ucdir_plugin.utils.protocols import Degrades

Metrics = Mapping[str, Mapping[str, Any]]
"""Name in tables -> ``{type: registered name, keyword arguments, better: higher or lower}``."""


def needs(cfg: Mapping[str, Any]) -> set[str]:
    """What a metric compares the image with: img2 (the truth), lq (the degraded input), or nothing."""
    return {"img2", "lq"} & set(inspect.signature(METRIC_REGISTRY.get(cfg["type"])).parameters)


def measure(
    image: np.ndarray,
    truth: Optional[np.ndarray],
    metrics: Metrics,
    lq: Optional[np.ndarray] = None,
    known: Optional[np.ndarray] = None,
) -> dict[str, Optional[float]]:
    """Metrics of one image; None where one cannot be measured (NIQE of a constant or very small image).

    Args:
        image, truth, lq: (H, W, 3) or (H, W) BGR uint8. Metrics that compare with what is not given, or with a truth of
            another size, are left out.
        known: (h, w) of 0 where the input has holes; None where it has none.
        metrics: of one image each; those of a set are left out.

    Raises:
        NotAvailable: if a package or weights are not there.
    """
    values: dict[str, Optional[float]] = {}
    for name, cfg in metrics.items():
        if cfg["type"] in distances.SETS:
            continue
        data = {"img": image}
        others = {"img2": truth, "lq": lq}
        data.update({key: others[key] for key in needs(cfg)})
        if known is not None and _takes(cfg, "known"):
            data["known"] = known
        if any(value is None for value in data.values()) or ("img2" in data and image.shape != truth.shape):
            continue
        if min(image.shape[:2]) <= 2 * cfg.get("crop_border", 0):  # nothing is left
            values[name] = None
            continue
        # BasicSR's NIQE fits statistics to blocks of 96x96: too small or constant an image has none.
        failures = (NotMeasurable,)
        if "img2" not in data:
            failures += (np.linalg.LinAlgError, ValueError, IndexError, RuntimeError, AssertionError)
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # NIQE of a block without values of one sign
                value = float(calculate_metric(data, {k: v for k, v in cfg.items() if k != "better"}))
        except failures:
            value = float("nan")
        values[name] = None if np.isnan(value) else value
    return values


class Evaluation:
    """Collects measurements of images; several processes each have one, and merge them.

    Args:
        metrics: as in option files. Those whose packages or weights are not there are reported as not available, with a
            warning that says what to do; the others are measured.
        weights_dir: where weights are looked for first (``val: weights_dir``).
        download: get weights that are not there.
        reference: files of images that are nobody's truths: FID and KID are then against these, all together.
        without_each: also FID and KID of all images but one, for each (``without``: image -> value), so that systems
            can be compared in pairs.

    Attributes:
        protocols: name -> stamp (:mod:`ucdir_plugin.metrics.protocol`) of what is measured.
        unavailable: name -> why not, and what to do.
    """

    def __init__(
        self,
        metrics: Metrics,
        weights_dir: Optional[str] = None,
        download: bool = False,
        without_each: bool = False,
        reference: Sequence[str] = (),
    ):
        self.without_each, self.reference = without_each, tuple(reference)
        self.protocols: dict[str, dict] = {}
        self.unavailable: dict[str, str] = {}
        self._metrics: dict[str, dict] = {}
        self._rows: list[tables.Row] = []
        self._failed: dict[str, str] = {}
        # (network, patch size, crop) -> stage -> image -> features of the result's patches and of the truth's
        self._features: dict[tuple, dict[str, dict[str, tuple]]] = {}
        self._of_reference: dict[tuple, list[np.ndarray]] = {}
        for name, given in metrics.items():
            cfg = _with_folder(given, weights_dir)
            try:
                self.protocols[name] = _stamp(cfg, download)
                if self.reference and cfg["type"] in distances.SETS:
                    folder = os.path.basename(os.path.dirname(self.reference[0])) or "."
                    self.protocols[name]["reference"] = f"{len(self.reference)} unpaired images of {folder}"
                self._metrics[name] = cfg
            except NotAvailable as err:
                self._drop(name, err)

    def empty(self) -> Evaluation:
        """One of the same metrics that has measured nothing."""
        twin = copy.copy(self)
        twin.protocols, twin.unavailable, twin._metrics = (
            dict(d) for d in (self.protocols, self.unavailable, self._metrics)
        )
        twin._rows, twin._features, twin._failed = [], {}, {}
        return twin

    def _drop(self, name: str, reason: NotAvailable) -> None:
        self.unavailable[name] = str(reason)
        self.protocols.pop(name, None)
        self._metrics.pop(name, None)
        get_root_logger().warning(f"metric {name} is not available: {reason}")

    def add(
        self,
        key: str,
        stages: Mapping[str, np.ndarray],
        truth: Optional[np.ndarray] = None,
        lq: Optional[np.ndarray] = None,
        files: Optional[Mapping[str, str]] = None,
        known: Optional[np.ndarray] = None,
    ) -> tables.Row:
        """Measure an image in each of its stages.

        Args:
            key: its name in tables, unlike any other's.
            stages: name -> (H, W, 3) or (H, W) BGR uint8; input, initial, restored.
            truth, lq: what full-reference metrics, and those of the degraded input, compare with.
            files: stage or truth -> path, for who reads the table.
            known: (h, w) of 0 where the input has holes; None where it has none.
        """
        row: tables.Row = {"image": key, "metrics": {stage: {} for stage in stages}}
        if files:
            row["files"] = dict(files)
        for name, cfg in list(self._metrics.items()):
            try:
                if cfg["type"] in distances.SETS:
                    self._add_features(key, stages, truth, cfg)
                    continue
                for stage, image in stages.items():
                    row["metrics"][stage].update(measure(image, truth, {name: cfg}, lq, known))
            except NotAvailable as err:  # installed but broken
                self._drop(name, err)
        self._rows.append(row)
        return row

    def _add_features(
        self, key: str, stages: Mapping[str, np.ndarray], truth: Optional[np.ndarray], cfg: Mapping[str, Any]
    ) -> None:
        kwargs = {**protocol.arguments(cfg), "weights_dir": cfg.get("weights_dir")}
        found = self._features.setdefault(_source(cfg), {})
        if self.reference:
            for stage, image in stages.items():
                if key not in found.setdefault(stage, {}):
                    found[stage][key] = (distances.patch_features(image, **kwargs), None)
            return
        fitting = {stage: image for stage, image in stages.items() if truth is not None and image.shape == truth.shape}
        if not fitting or any(key in images for images in found.values()):  # the latter: FID's serve KID too
            return
        of_truth = distances.patch_features(truth, **kwargs)
        for stage, image in fitting.items():
            found.setdefault(stage, {})[key] = (distances.patch_features(image, **kwargs), of_truth)

    def _reference_features(self, cfg: Mapping[str, Any]) -> list[np.ndarray]:
        """Features of the reference's patches, an array an image; computed once for each network."""
        source = _source(cfg)
        if source not in self._of_reference:
            kwargs = {**protocol.arguments(cfg), "weights_dir": cfg.get("weights_dir")}
            self._of_reference[source] = [
                distances.patch_features(read_uint8(file), **kwargs) for file in self.reference
            ]
        return self._of_reference[source]

    def fail(self, key: str, reason: str) -> None:
        """An image that could not be restored: it is in no table and no mean, and said."""
        get_root_logger().warning(f"failed: {named(key, reason)}")
        self._failed[key] = reason

    def share(self) -> dict[str, Any]:
        """What another process needs to :meth:`merge` this one's measurements; for pickling."""
        return {"rows": self._rows, "features": self._features, "failed": self._failed, "unavailable": self.unavailable}

    def merge(self, shares: Sequence[Mapping[str, Any]]) -> None:
        """Take over the measurements of others, of other images. What one of them could not measure is dropped."""
        for share in shares:
            self._rows = self._rows + share["rows"]
            self._failed.update(share["failed"])
            for source, stages in share["features"].items():
                for stage, images in stages.items():
                    self._features.setdefault(source, {}).setdefault(stage, {}).update(images)
            for name, reason in share["unavailable"].items():
                if name not in self.unavailable:
                    self._drop(name, NotAvailable(reason))

    def results(self) -> tables.Results:
        """All measurements, in the order of the images' keys: the same however images were shared out."""
        rows = sorted(self._rows, key=lambda row: row["image"])
        for row in rows:
            for values in row["metrics"].values():
                for name in values.keys() & self.unavailable.keys():  # measured here, not everywhere
                    del values[name]
        sets: dict[str, dict[str, dict]] = {}
        for name, cfg in self._metrics.items():
            if cfg["type"] in distances.SETS:
                for stage, images in self._features.get(_source(cfg), {}).items():
                    kind, keys = distances.SETS[cfg["type"]], sorted(images)
                    pairs = [images[key] for key in keys]
                    if self.reference:
                        others = self._reference_features(cfg)
                        summary = distances.summary_unpaired(kind, [features for features, _ in pairs], others)
                        sets.setdefault(stage, {})[name] = summary
                        continue
                    found = sets.setdefault(stage, {})[name] = distances.summary(kind, pairs)
                    if self.without_each:
                        found["without"] = dict(zip(keys, distances.without_each(kind, pairs)))
        failed = {key: self._failed[key] for key in sorted(self._failed)}
        return tables.Results(rows, self.protocols, sets, self.unavailable, failed)


def _takes(cfg: Mapping[str, Any], name: str) -> bool:
    return name in inspect.signature(METRIC_REGISTRY.get(cfg["type"])).parameters


def _with_folder(cfg: Mapping[str, Any], weights_dir: Optional[str]) -> dict[str, Any]:
    return {**({"weights_dir": weights_dir} if weights_dir and _takes(cfg, "weights_dir") else {}), **cfg}


def for_dataset(metrics: Metrics, dataset: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics with ``degradation: own`` replaced by the degradation that a data set declares, if it declares one.

    Args:
        dataset: its options.
    """
    kind = DATASET_REGISTRY.get(dataset["type"]) if "type" in dataset else None
    if not isinstance(kind, type) or not issubclass(kind, Degrades):
        return {name: dict(cfg) for name, cfg in metrics.items()}
    own = {"degradation": kind.declared(dict(dataset))}
    return {
        name: {**cfg, **(own if cfg.get("degradation") == OWN and _takes(cfg, "degradation") else {})}
        for name, cfg in metrics.items()
    }


def _source(cfg: Mapping[str, Any]) -> tuple:
    kwargs = protocol.arguments(cfg)
    return kwargs["network"], kwargs["patch_size"], kwargs["crop_border"]


def not_available(metrics: Metrics, weights_dir: Optional[str] = None) -> list[str]:
    """Names of those metrics whose packages or weights are not there."""
    found = []
    for name, cfg in metrics.items():
        try:
            protocol.stamp(_with_folder(cfg, weights_dir))
        except NotAvailable:
            found.append(name)
    return sorted(found)


def _stamp(cfg: Mapping[str, Any], download: bool) -> dict[str, Any]:
    """The protocol's stamp; with ``download``, weights that are not there are had first."""
    tried = set()
    while True:
        try:
            return protocol.stamp(cfg)
        except NotAvailable as err:
            if not download or err.file is None or err.file in tried:
                raise
            tried.add(err.file)
            get_root_logger().info(f"downloading {err.file.url}")
            err.file.download(cfg.get("weights_dir"))


def reference_images(folder: Optional[str], where: str) -> list[str]:
    """Files of a folder of images that results are compared with as a whole; none without a folder.

    Args:
        where: that names it, for messages.

    Raises:
        UserError: if the folder is missing, or has fewer than two images.
    """
    if folder is None:
        return []
    files = [os.path.join(folder, name) for name in list_images(folder, where)]
    if len(files) < 2:
        raise UserError(f"{where} {folder}: FID and KID compare sets of images, and there is one image: give more")
    return files


def for_basicsr_loop(
    metrics: Optional[Metrics], weights_dir: Optional[str] = None, warn: Optional[Callable[[str], None]] = None
) -> Optional[dict[str, dict]]:
    """Those metrics that a validation loop of BasicSR's own can measure: it has an image and its truth, no more.

    Args:
        warn: is told of the others, which are left out. Default: the log.
    """
    warn = warn or get_root_logger().warning
    kept = {}
    for name, given in (metrics or {}).items():
        cfg, reason = _with_folder(given, weights_dir), None
        if cfg["type"] in distances.SETS:
            reason = "it is of a set of images"
        elif "lq" in needs(cfg):
            reason = "it needs the degraded input"
        else:
            try:
                protocol.stamp(cfg)
            except NotAvailable as err:
                reason = str(err)
        if reason is None:
            kept[name] = cfg
        else:
            warn(f"metric {name} is not measured in this model's own validation: {reason}")
    return kept or None
