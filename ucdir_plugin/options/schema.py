"""The keys of option files with their types, ranges and defaults."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import typing
from typing import Annotated, Any, Dict, Iterable, List, Literal, Mapping, Optional, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ucdir_plugin.diffusion import schedule
from ucdir_plugin.diffusion.samplers import SAMPLERS
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.utils.errors import UserError, did_you_mean, printable
from ucdir_plugin.utils.option_types import Int, NotNegativeInt, PositiveInt

SPACINGS = ("respace", *(name for name in schedule.SPACINGS if name != "uniform"), "rescale")
"""Of sampling steps: ``respace`` is uniform in t, ``rescale`` a new schedule (the release's)."""


def sampling_schedule(training: NoiseSchedule, options: SamplingOptions) -> NoiseSchedule:
    """The levels to sample at: some of the training's (paper), or a new linear schedule (``rescale``, release)."""
    if options.spacing == "rescale":
        return NoiseSchedule.linear(options.steps, training.betas[0], options.rescale_end)
    if options.start_timestep is not None:
        training = training.truncate(options.start_timestep)
    return training.respace(options.steps, "uniform" if options.spacing == "respace" else options.spacing)


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


TimeSteps = Annotated[PositiveInt, Field(le=1_000_000)]


def _file_name(value: str) -> str:
    """A part of files' names: results stay in their folder."""
    if (
        value in (".", "..")
        or value != value.strip()
        or re.search(r"[/\\]|^[A-Za-z]:", value)
        or not 0 < len(value.encode()) <= 150
        or printable(value) != value
    ):
        raise ValueError("a name for files is expected, without / \\ .. and line breaks, of 1 to 150 bytes")
    return value


FileName = Annotated[str, AfterValidator(_file_name)]


class ScheduleOptions(_Schema):
    """Training noise schedule; ``start`` and ``end`` are betas, of the linear one."""

    type: Literal["linear", "cosine"] = "linear"
    timesteps: TimeSteps = 2000
    start: float = Field(1e-6, gt=0, lt=1)
    end: float = Field(1e-2, gt=0, lt=1)

    def schedule(self) -> NoiseSchedule:
        """Build the noise schedule.

        Raises:
            UserError: if there is none of these numbers.
        """
        try:
            if self.type == "cosine":
                return NoiseSchedule.cosine(self.timesteps)
            return NoiseSchedule.linear(self.timesteps, self.start, self.end)
        except ValueError as err:
            raise UserError(f"option diffusion: {err}") from err


class PriorScheduleOptions(ScheduleOptions):
    """Noise schedule of a prior: DDPM's, as :func:`ucdir_plugin.zoo.priors.load_prior` expects it."""

    timesteps: TimeSteps = 1000
    start: float = Field(1e-4, gt=0, lt=1)
    end: float = Field(2e-2, gt=0, lt=1)


class SamplingOptions(_Schema):
    """How validation and test sample."""

    sampler: Literal[tuple(SAMPLERS)] = "ddpm"
    steps: PositiveInt = 50
    spacing: Literal[SPACINGS] = "respace"
    rescale_end: float = Field(0.1, gt=0, lt=1)
    eta: Optional[float] = Field(None, ge=0, le=1)
    start_timestep: Optional[PositiveInt] = None
    clip_x0: bool = True
    dynamic_threshold: Optional[float] = Field(None, gt=0, le=1)
    border: NotNegativeInt = Field(8, le=1024)  # without it the outermost pixels keep noise
    amp: Optional[Literal["bf16", "fp16"]] = None
    tile: Optional[PositiveInt] = None
    overlap: NotNegativeInt = 64
    tile_batch: PositiveInt = 1
    grid: Literal["aligned", "released"] = "aligned"
    merge: Literal["drop", "blend"] = "drop"
    split: Literal["inter_step", "per_patch"] = "inter_step"
    cache_mb: NotNegativeInt = 1024


def check_sampling(options: SamplingOptions, training: NoiseSchedule, where: str = "val:sampling:") -> None:
    """What the keys of SamplingOptions say together."""

    def fault(key: str, message: str) -> None:
        raise UserError(f"option {where}{key}: {message}")

    sampling, timesteps = options.model_dump(), len(training)
    steps, start = sampling["steps"], sampling["start_timestep"]
    if start is not None and start > timesteps:
        fault("start_timestep", f"{start} is more than the schedule's {timesteps} (diffusion)")
    if start is not None and sampling["spacing"] == "rescale":
        fault("start_timestep", "has no meaning with spacing: rescale; remove one of them")
    if steps > (start or timesteps):
        of = f"start_timestep's {start}" if start else f"the schedule's {timesteps} (diffusion)"
        fault("steps", f"{steps} is more than {of}")
    if sampling["eta"] is not None and not SAMPLERS[sampling["sampler"]].takes_eta:
        those = " and ".join(name for name, sampler in SAMPLERS.items() if sampler.takes_eta)
        fault("eta", f"has no meaning for {sampling['sampler']}, only for {those}; remove it")
    if sampling["dynamic_threshold"] is not None and not sampling["clip_x0"]:
        fault("dynamic_threshold", "is a way to clip x0: set clip_x0 to true")
    if sampling["tile"] is not None and 2 * sampling["overlap"] >= sampling["tile"]:
        fault(
            "overlap",
            f"{sampling['overlap']} must be smaller than half the tile ({sampling['tile']}):"
            f" take at most {(sampling['tile'] - 1) // 2}, or a larger tile",
        )
    try:
        sampling_schedule(training, options)
    except ValueError as err:
        fault("rescale_end" if sampling["spacing"] == "rescale" else "spacing", str(err))


def sampling_options(values: Mapping[str, Any], training: NoiseSchedule) -> SamplingOptions:
    """Sampling options from elsewhere than an option file, checked.

    Args:
        training: the network's.

    Raises:
        UserError: naming the first key that is unknown or wrong, with the cure.
    """
    try:
        checked = SamplingOptions.model_validate_json(to_json(values, "sampling"))
    except ValidationError as err:
        error = err.errors()[0]
        if error["type"] == "extra_forbidden":
            key = error["loc"][-1]
            raise UserError(f"unknown option {key}; {did_you_mean(key, SamplingOptions.model_fields)}") from err
        raise UserError(explain(error)) from err
    check_sampling(checked, training, "")
    return checked


class _Typed(_Schema):
    """A configuration with a ``type``; its other keys are checked against the signature of that type."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)
    type: str


class PathOptions(_Schema):
    """Files of weights and states (section ``path``)."""

    pretrain_network_g: Optional[str] = None
    param_key_g: Optional[str] = "params"
    strict_load_g: bool = True
    pretrain_network_predictor: Optional[str] = None
    param_key_predictor: Optional[str] = "params"
    resume_state: Optional[str] = None
    ignore_resume_networks: Optional[Union[str, List[str]]] = None


class ValOptions(_Schema):
    """Validation and test: how often, which metrics, how to sample (section ``val``)."""

    val_freq: PositiveInt = 5000
    save_img: bool = True
    suffix: Optional[FileName] = None
    pbar: bool = True
    metrics: Optional[Dict[str, _Typed]] = None
    reference: Optional[str] = None
    weights_dir: Optional[str] = None
    download: bool = False
    samples: NotNegativeInt = Field(16, le=4096)
    sampling: SamplingOptions = SamplingOptions()


class LoggerOptions(_Schema):
    """How often to log and to save (section ``logger``)."""

    print_freq: PositiveInt = 100
    save_checkpoint_freq: PositiveInt = 5000
    use_tb_logger: bool = False
    wandb: Optional[dict] = None


class PredictorOptions(_Schema):
    """How UCDIR's initial predictor trains; default: as the denoiser."""

    frozen: bool = False
    lr: Optional[float] = Field(None, gt=0)


class TeacherOptions(_Schema):
    """What a student learns from; default sampling: the teacher's own."""

    model: str
    sampling: Optional[Dict[str, Any]] = None


class TrainOptions(_Schema):
    """Iterations, optimizer, losses, averages (section ``train``)."""

    total_iter: PositiveInt
    warmup_iter: Int = -1
    optim_g: _Typed
    scheduler: Optional[_Typed] = None
    ema_decay: float = Field(0.0, ge=0, lt=1)
    ema_start: NotNegativeInt = 0
    diffusion_opt: Optional[_Typed] = None
    initial_opt: Optional[_Typed] = None
    variance_opt: Optional[_Typed] = None
    predictor: Optional[PredictorOptions] = None
    teacher: Optional[TeacherOptions] = None
    distillation_opt: Optional[_Typed] = None
    grad_clip: Optional[float] = Field(None, gt=0)
    accumulate: PositiveInt = 1
    amp: Optional[Literal["bf16", "fp16"]] = None
    max_bad_steps: PositiveInt = 10


class _UselessHere(_Schema):
    """Keys of BasicSR's own files with nothing left to do: sampling is endless and always shuffled, workers stay."""

    dataset_enlarge_ratio: PositiveInt = 1
    use_shuffle: bool = True
    persistent_workers: bool = False


class DatasetOptions(_UselessHere):
    """Keys of BasicSR's loader and its image datasets.

    What else a data set of this package takes, its class says (``options``); other packages' have their own ideas.
    """

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    name: FileName
    type: str
    dataroot_gt: Optional[str] = None
    dataroot_lq: Optional[str] = None
    meta_info_file: Optional[str] = None
    filename_tmpl: str = "{}"
    io_backend: dict = Field(default_factory=lambda: {"type": "disk"})
    gt_size: Optional[PositiveInt] = None
    use_hflip: bool = False
    use_rot: bool = False
    color: Optional[str] = None
    mean: Optional[List[float]] = None
    std: Optional[List[float]] = None
    condition: Dict[str, Union[float, str]] = Field(default_factory=dict)
    num_worker_per_gpu: NotNegativeInt = Field(0, le=512)
    batch_size_per_gpu: Optional[PositiveInt] = None  # 1
    batch_size_total: Optional[PositiveInt] = None  # of training, instead
    prefetch_mode: Optional[Literal["cpu", "cuda"]] = None
    num_prefetch_queue: PositiveInt = Field(1, le=1024)
    pin_memory: bool = False
    wait_for_data: float = Field(300.0, ge=0)  # seconds, in training, for a disk that does not answer


class FirstStageOptions(_Schema):
    """What another restorer makes of the image first: a model, or images that are there already."""

    model: Optional[str] = None
    weights: Optional[str] = None
    images: Optional[str] = None
    use: Literal["start", "target", "both"] = "start"


class BirdOptions(_Schema):
    """BIR-D: the task, the prior, and what differs from the preset."""

    task: str = "blind"
    prior: str = "ffdnet"
    network: Optional[Dict[str, Any]] = None  # of a prior's file that does not say what it is
    solver: Literal["bird", "ddnm", "ddrm", "dps", "diffpir"] = "bird"
    preset: str = "default"
    ablation: Optional[Literal["A", "B", "C", "D"]] = None
    noise: Optional[float] = Field(None, ge=0, le=255)  # of y, of 255
    blur: Optional[Dict[str, Any]] = None
    settings: Annotated[Dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)] = Field(
        default_factory=dict
    )
    observations: Optional[List[str]] = None
    mask: Optional[str] = None
    holes: Literal["white", "black"] = "white"
    first_stage: Optional[FirstStageOptions] = None
    tile: Optional[NotNegativeInt] = None  # None: as the prior was trained, else 1024; 0: images whole
    overlap: Optional[NotNegativeInt] = None
    tile_batch: PositiveInt = 1
    merge: Literal["drop", "blend"] = "drop"


class DistOptions(_Schema):
    """How processes find each other (:func:`ucdir_plugin.compat.init_dist`)."""

    backend: Literal["nccl", "gloo"] = "nccl"
    port: Optional[PositiveInt] = Field(None, le=65535)
    timeout: Optional[float] = Field(None, gt=0, le=1e7)


class MMEngineOptions(_Schema):
    """What only MMEngine has; each ``type`` is one of its registries', or of a package that has been imported."""

    hooks: List[_Typed] = Field(default_factory=list)  # beside this package's
    default_hooks: Dict[str, Optional[_Typed]] = Field(default_factory=dict)
    visualizer: Optional[_Typed] = None
    log_processor: Optional[Dict[str, Any]] = None
    optim_wrapper: Optional[Dict[str, Any]] = None
    param_scheduler: Optional[List[_Typed]] = None
    model_wrapper: Optional[Dict[str, Any]] = None
    strategy: Optional[_Typed] = None
    activation_checkpointing: Optional[List[str]] = None
    auto_scale_lr: Optional[Dict[str, Any]] = None
    custom_imports: Optional[Union[str, List[str]]] = None


class Options(_Schema):
    """All sections of an option file."""

    engine: Literal["basicsr", "mmengine"] = "basicsr"
    mmengine: Optional[MMEngineOptions] = None
    imports: Optional[Union[str, List[str]]] = None  # modules that register what is used here
    name: FileName
    model_type: str
    scale: PositiveInt = Field(1, le=64)
    num_gpu: Union[Literal["auto"], NotNegativeInt] = "auto"
    manual_seed: Optional[Int] = 0
    datasets: Dict[str, DatasetOptions] = Field(default_factory=dict)  # none: to restore files only
    network_g: Optional[_Typed] = None
    bird: Optional[BirdOptions] = None
    path: PathOptions = PathOptions()
    train: Optional[TrainOptions] = None
    val: ValOptions = ValOptions()
    logger: LoggerOptions = LoggerOptions()
    diffusion: ScheduleOptions = ScheduleOptions()
    dist_params: DistOptions = DistOptions()
    find_unused_parameters: bool = False
    compile: bool = False


def _fields_at(loc: tuple) -> List[str]:
    """The option names known at a place of the schema."""
    place: Any = Options
    for part in loc:
        if typing.get_origin(place) is dict:
            place = typing.get_args(place)[1]
        elif inspect.isclass(place) and part in getattr(place, "model_fields", {}):
            place = place.model_fields[part].annotation
        else:
            return []
        if typing.get_origin(place) is Union:
            place = next(arg for arg in typing.get_args(place) if arg is not type(None))
    return list(getattr(place, "model_fields", {}))


def missing(name: str, given: Mapping[str, Any], known: Iterable[str] = ()) -> str:
    """What to say of a required option that is not there: a key beside it may be its name, misspelt.

    Args:
        name: with the sections above it, such as ``train:total_iter``.
        given: the section as it was given.
        known: other options of the section, which are no misspelling.
    """
    section, _, key = name.rpartition(":")
    others = [str(other) for other in given if other not in known]
    near = difflib.get_close_matches(key, others, n=1)
    if not near:
        return f"option {name} is missing"
    return f"unknown option {':'.join(filter(None, (section, near[0])))}; did you mean {key!r}, which is required?"


def explain(error: dict) -> str:
    """One line for a fault that pydantic found: the option's name, what is wrong, and the nearest known name."""
    # Branches of a Union show up as extra parts of the location: they are no option names. An unknown one is itself.
    branch = re.compile(r"[\[\]]|^(int|float|str)$")
    *above, last = error["loc"] or ("",)
    kept = [part for part in above if not (isinstance(part, str) and branch.search(part))]
    loc = kept if error["type"] != "extra_forbidden" and branch.search(str(last)) else [*kept, last]
    name = ":".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        return f"unknown option {name}; {did_you_mean(loc[-1], _fields_at(loc[:-1]))}"
    if error["type"] == "missing":
        return missing(name, error["input"] if isinstance(error["input"], dict) else {}, _fields_at(loc[:-1]))
    message = error["msg"].removeprefix("Value error, ")
    return f"option {name}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def to_json(value: Any, where: str) -> str:
    """JSON, in which strict types still let a list stand for a tuple, as YAML needs."""
    try:
        return json.dumps(value)
    except TypeError as err:
        raise UserError(f"{where}: only plain values are read ({err})") from err
