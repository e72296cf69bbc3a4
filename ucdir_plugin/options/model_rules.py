"""What each of this package's models makes of option files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple

from ucdir_plugin.options.schema import PriorScheduleOptions, ScheduleOptions


@dataclass(frozen=True)
class ModelRules:
    """What a model makes of option files.

    Attributes:
        own: a model of this package; others take keys of their own.
        trains: whether it trains by a task of this package (schedule, losses on noise, conditions).
        blind: whether it is BIR-D.
        loss: the option of its training's loss.
        schedule: of training.
        meaningless: options that it has no use for.
        sections: that only other models need; they are dropped.
    """

    own: bool = True
    trains: bool = True
    blind: bool = False
    loss: str = "diffusion_opt"
    schedule: type = ScheduleOptions
    meaningless: Tuple[str, ...] = ()
    sections: Tuple[str, ...] = ("bird",)


_PATCHES = ("start_timestep", "border", "tile", "overlap", "tile_batch", "grid", "merge", "split", "cache_mb")
_DISTILLATION = ("train:teacher", "train:distillation_opt")
_DIFFUSION = ("diffusion", "compile", "val:sampling", "val:samples")

MODELS: Dict[str, ModelRules] = {
    "UCDIRModel": ModelRules(
        meaningless=("train:variance_opt", "val:samples", *_DISTILLATION), sections=("bird", "val:samples")
    ),
    "UCDIRStudentModel": ModelRules(
        loss="distillation_opt",
        meaningless=(
            "train:variance_opt",
            "train:diffusion_opt",
            "train:initial_opt",
            "train:predictor",
            "path:pretrain_network_predictor",
            "val:samples",
        ),
        sections=("bird", "val:samples"),
    ),
    "DiffusionPriorModel": ModelRules(
        schedule=PriorScheduleOptions,
        meaningless=(
            "train:initial_opt",
            "train:predictor",
            *_DISTILLATION,
            "path:pretrain_network_predictor",
            "val:metrics",
            *(f"val:sampling:{key}" for key in _PATCHES),
        ),
    ),
    "BIRDModel": ModelRules(
        trains=False,
        blind=True,
        meaningless=("network_g", "diffusion", "train", "compile", "val:sampling"),
        sections=("network_g", *_DIFFUSION),
    ),
}
FOREIGN = ModelRules(own=False, trains=False, sections=("bird", *_DIFFUSION))
"""A model of BasicSR or of another package."""
