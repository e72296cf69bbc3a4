"""Option files: read safely, overridden from the command line, checked, and completed with defaults.

BasicSR's YAML loader executes python tags and its ``--force_yml`` uses exec and eval; here both are plain YAML.
What this package owns is checked strictly (unknown keys, types, ranges); the keyword arguments of a foreign network,
loss, metric or optimizer are checked against its signature and passed on.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import typing
from typing import Annotated, Any, Dict, Hashable, List, Literal, Mapping, Optional, Tuple, Union

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from ucdir_plugin import registry
from ucdir_plugin.conditions import check_told, declare
from ucdir_plugin.data.degradations import chain
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.errors import NotAvailable, UserError, did_you_mean, printable
from ucdir_plugin.metrics import protocol

_TEXT, _VALUES, _DEPTH = 2**20, 100_000, 50
"""The most that options may be: characters, values, levels."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.2) and refuses a key given twice, and endless brackets."""

    def fetch_flow_collection_start(self, TokenClass: type) -> None:
        if self.flow_level > _DEPTH:  # the time grows with the square
            raise UserError(f"line {self.line + 1}: nested too deeply")
        super().fetch_flow_collection_start(TokenClass)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            line = key_node.start_mark.line + 1
            raise UserError(f"line {line}: a key must be plain text (put quotes around values with braces)")
        if key in seen and key != "<<":
            raise UserError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; remove one")
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML without python tags.

    Raises:
        UserError: naming ``where`` and the line.
    """
    if len(text) > _TEXT:
        raise UserError(f"{where}: more than {_TEXT} characters are no options")
    try:
        content = yaml.load(text, Loader=_Loader)
    except UserError as err:
        raise UserError(f"{where}: {err}") from err
    except yaml.constructor.ConstructorError as err:
        line = f", line {err.problem_mark.line + 1}" if err.problem_mark else ""
        raise UserError(f"{where}{line}: {err.problem}; only plain YAML is read, tags are refused") from err
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: no valid YAML: {getattr(err, 'problem', None) or err}") from err
    except RecursionError as err:
        raise UserError(f"{where}: no valid YAML: nested too deeply") from err
    except (ValueError, LookupError, ArithmeticError, TypeError) as err:  # a date, number or letter that is none
        raise UserError(f"{where}: no valid YAML: {err}") from err
    check_plain(content, where)
    return content


def check_plain(content: Any, where: str) -> None:
    """Whether it may be walked through, written as JSON, and its numbers be computed with.

    Raises:
        UserError: for what is nested too deeply or, through anchors that repeat each other, too much; keys that are no
            text; NaN, infinite and very large numbers; texts with control characters.
    """

    def fault(place: tuple, message: str) -> None:
        raise UserError(f"{where}: option {printable(':'.join(map(str, place)))}: {message}")

    left, stack = _VALUES, [((), content)]
    while stack:
        place, value = stack.pop()
        inner: list = []
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    fault(place, f"the key {key!r} must be text: put quotes around it")
            inner = list(value.items())
        elif isinstance(value, (list, tuple)):
            inner = list(enumerate(value))
        elif not math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and abs(value) >= 2**63:
            fault(place, f"{value} is no number to compute with")
        elif isinstance(value, str) and printable(text := re.sub(r"[\n\t]", "", value)) != text:
            fault(place, f"{value!r} has control characters; remove them")
        left -= len(inner)
        if left < 0 or len(place) > _DEPTH:
            raise UserError(f"{where}: more than {_VALUES} values or {_DEPTH} levels, anchors counted, are no options")
        stack += [((*place, key), item) for key, item in inner]


def apply_overrides(opt: dict, entries: Optional[List[str]], where: str = "--force_yml") -> None:
    """Apply ``--force_yml a:b=value`` entries in place; values are YAML, missing levels are created.

    Raises:
        UserError: for an entry without '=', or a path through something that is no mapping.
    """
    for entry in entries or ():
        path, separator, value = entry.partition("=")
        keys = [key.strip() for key in path.split(":")]
        if not separator or not all(keys) or len(keys) > _DEPTH:
            raise UserError(f"{where} {entry!r}: write it as key:subkey=value")
        target = opt
        for depth, key in enumerate(keys[:-1]):
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
            if not isinstance(target, dict):
                raise UserError(f"{where} {entry!r}: {':'.join(keys[: depth + 1])} is no mapping")
        target[keys[-1]] = read_yaml(value, f"{where} {entry!r}")


def read_assignments(entries: List[str], where: str) -> Dict[str, Any]:
    """KEY=VALUE entries of the command line; values are YAML.

    Raises:
        UserError: for one without '=', or one that is no plain YAML.
    """
    result: Dict[str, Any] = {}
    apply_overrides(result, entries, where)
    return result


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _whole(value: Any) -> Any:
    """5e3 stands for 5000, as BasicSR's own option files have it."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


Int = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[Int, Field(gt=0)]
NotNegativeInt = Annotated[Int, Field(ge=0)]
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
        """
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
    """That of a prior: DDPM's, which :func:`ucdir_plugin.priors.load_prior` takes a file of weights to be of."""

    timesteps: TimeSteps = 1000
    start: float = Field(1e-4, gt=0, lt=1)
    end: float = Field(2e-2, gt=0, lt=1)


class SamplingOptions(_Schema):
    """How validation and test sample."""

    sampler: Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"] = "ddpm"
    steps: PositiveInt = 50
    spacing: Literal["respace", "trailing", "quadratic", "rescale"] = "respace"
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


def _check_sampling(options: SamplingOptions, training: NoiseSchedule, where: str = "val:sampling:") -> None:
    """What the keys of SamplingOptions say together."""
    from ucdir_plugin.sampling import sampling_schedule  # which imports the networks

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
    if sampling["eta"] is not None and sampling["sampler"] not in ("ddim", "dpmpp_2m_sde"):
        fault("eta", f"has no meaning for {sampling['sampler']}, only for ddim and dpmpp_2m_sde; remove it")
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
        checked = SamplingOptions.model_validate_json(_to_json(values, "sampling"))
    except ValidationError as err:
        error = err.errors()[0]
        if error["type"] == "extra_forbidden":
            key = error["loc"][-1]
            raise UserError(f"unknown option {key}; {did_you_mean(key, SamplingOptions.model_fields)}") from err
        raise UserError(_explain(error)) from err
    _check_sampling(checked, training, "")
    return checked


class _Typed(_Schema):
    """A configuration with a ``type``; its other keys are checked against the signature of that type."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str


class PathOptions(_Schema):
    pretrain_network_g: Optional[str] = None
    param_key_g: Optional[str] = "params"
    strict_load_g: bool = True
    pretrain_network_predictor: Optional[str] = None
    param_key_predictor: Optional[str] = "params"
    resume_state: Optional[str] = None
    ignore_resume_networks: Optional[Union[str, List[str]]] = None


class ValOptions(_Schema):
    val_freq: PositiveInt = 5000
    save_img: bool = True
    suffix: Optional[FileName] = None
    pbar: bool = True
    metrics: Optional[Dict[str, _Typed]] = None
    weights_dir: Optional[str] = None
    download: bool = False
    samples: NotNegativeInt = Field(16, le=4096)
    sampling: SamplingOptions = SamplingOptions()


class LoggerOptions(_Schema):
    print_freq: PositiveInt = 100
    save_checkpoint_freq: PositiveInt = 5000
    use_tb_logger: bool = False
    wandb: Optional[dict] = None


class PredictorOptions(_Schema):
    """How UCDIR's initial predictor trains; default: as the denoiser."""

    frozen: bool = False
    lr: Optional[float] = Field(None, gt=0)


class TrainOptions(_Schema):
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
    grad_clip: Optional[float] = Field(None, gt=0)
    accumulate: PositiveInt = 1
    amp: Optional[Literal["bf16", "fp16"]] = None
    max_bad_steps: PositiveInt = 10


class DatasetOptions(_Schema):
    """Keys of BasicSR's loader and its image datasets, and of this package's.

    Sampling is endless and always shuffled here, so that ``use_shuffle``, ``dataset_enlarge_ratio``,
    ``persistent_workers`` and ``prefetch_mode: cpu`` of BasicSR's files have nothing left to do.
    """

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
    quality: Union[int, Tuple[int, int], None] = None
    view_scale: Union[float, Tuple[float, float], None] = None
    degradations: Optional[List[Dict[str, Any]]] = None
    ratio: Union[float, Tuple[float, float], None] = None
    electrons: Union[float, Tuple[float, float], None] = None
    read: Union[float, Tuple[float, float], None] = None
    row: Union[float, Tuple[float, float], None] = None
    bits: Optional[PositiveInt] = None
    seed: Optional[Int] = None
    condition: Dict[str, Union[float, str]] = Field(default_factory=dict)
    condition_file: Optional[str] = None
    num_worker_per_gpu: NotNegativeInt = Field(0, le=512)
    batch_size_per_gpu: Optional[PositiveInt] = None  # 1
    batch_size_total: Optional[PositiveInt] = None  # of training, instead
    dataset_enlarge_ratio: PositiveInt = 1
    use_shuffle: bool = True
    prefetch_mode: Optional[Literal["cpu", "cuda"]] = None
    num_prefetch_queue: PositiveInt = Field(1, le=1024)
    pin_memory: bool = False
    persistent_workers: bool = False
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
    solver: Literal["bird", "ddnm", "dps", "diffpir"] = "bird"
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
    custom_imports: Optional[List[str]] = None


class Options(_Schema):
    engine: Literal["basicsr", "mmengine"] = "basicsr"
    mmengine: Optional[MMEngineOptions] = None
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


# Of the keys in DatasetOptions, those that one of this package's datasets alone has, and by it those without meaning.
_ONLY = {
    "CleanImageDataset": {"view_scale", "seed"},
    "PairedRestorationDataset": {"dataroot_lq", "meta_info_file", "filename_tmpl", "io_backend", "condition_file"},
    "JPEGDataset": {"quality"},
    "LowLightDataset": {"ratio", "electrons", "read", "row", "bits", "seed"},
    "MixedDegradationDataset": {"degradations", "seed"},
    "RawPairDataset": {"meta_info_file", "ratio"},
}
_MEANINGLESS = {name: {"color", "mean", "std"}.union(*_ONLY.values()) - own for name, own in _ONLY.items()}
_KNOWN_MODELS = {"UCDIRModel", "DiffusionPriorModel", "BIRDModel"}
# What the other of the two has.
_FOREIGN = {
    "UCDIRModel": ("train:variance_opt", "val:samples"),
    "DiffusionPriorModel": (
        "train:initial_opt", "train:predictor", "path:pretrain_network_predictor", "val:metrics",
        *(f"val:sampling:{key}" for key in ("start_timestep", "border", "tile", "overlap", "tile_batch", "grid",
                                            "merge", "split", "cache_mb")),
    ),
}  # fmt: skip


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


def _explain(error: dict) -> str:
    # Branches of a Union show up as extra parts of the location: they are no option names. An unknown one is itself.
    branch = re.compile(r"[\[\]]|^(int|float|str)$")
    *above, last = error["loc"] or ("",)
    kept = [part for part in above if not (isinstance(part, str) and branch.search(part))]
    loc = kept if error["type"] != "extra_forbidden" and branch.search(str(last)) else [*kept, last]
    name = ":".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        return f"unknown option {name}; {did_you_mean(loc[-1], _fields_at(loc[:-1]))}"
    if error["type"] == "missing":
        return f"option {name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"option {name}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def check_call(target: Any, kwargs: Mapping[str, Any], where: str, given: int = 0, own: bool = False) -> None:
    """Check keyword arguments against a callable's signature, and their types for this package's own (``own``).

    Args:
        given: positional parameters that the caller supplies itself (after ``self``).

    Raises:
        UserError: for an unknown, missing or wrongly typed argument.
    """
    function = target.__init__ if inspect.isclass(target) else target
    parameters = list(inspect.signature(function).parameters.values())
    parameters = parameters[given + inspect.isclass(target) :]
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in kwargs:
        if key not in known and not open_ended:
            raise UserError(f"unknown option {where}:{key} for {target.__name__}; {did_you_mean(key, known)}")
    for p in parameters:
        if p.name in known and p.default is p.empty and p.name not in kwargs:
            raise UserError(f"option {where}:{p.name} is missing ({target.__name__} needs it)")
    if not own:
        return
    hints = typing.get_type_hints(function)
    for key, value in kwargs.items():
        if key in hints:
            try:
                TypeAdapter(hints[key]).validate_json(_to_json(value, f"option {where}:{key}"), strict=True)
            except ValidationError as err:
                message = err.errors()[0]["msg"]
                hint = _near(value, hints[key])
                raise UserError(
                    f"option {where}:{key}: {message[0].lower()}{message[1:]}, got {value!r}{hint}"
                ) from err


def _near(value: Any, hint: Any) -> str:
    """The nearest of the names that an option may have, if it is one of names and one is near."""
    known = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    nearest = did_you_mean(value, known) if isinstance(value, str) else ""
    return f"; {nearest}" if nearest.startswith("did you mean") else ""


def _to_json(value: Any, where: str) -> str:
    """JSON, in which strict types still let a list stand for a tuple, as YAML needs."""
    try:
        return json.dumps(value)
    except TypeError as err:
        raise UserError(f"{where}: only plain values are read ({err})") from err


def _is_own(target: Any) -> bool:
    return target.__module__.split(".")[0] == "ucdir_plugin"


def check_registered(kind: str, cfg: Any, where: str, given: int = 0) -> None:
    """Check ``{type: NAME, ...}`` against the registry and the signature; nested networks too."""
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("type"), str):
        raise UserError(f"option {where}: a mapping with 'type: NAME' is expected, got {cfg!r}")
    target = registry.lookup(kind, cfg["type"], f"option {where}:type")
    kwargs = {k: v for k, v in cfg.items() if k != "type"}
    own = _is_own(target)
    check_call(target, kwargs, where, given, own)
    if own and kind == "arch":
        for key, hint in typing.get_type_hints(target.__init__).items():
            if hint in (dict, Optional[dict]) and kwargs.get(key) is not None:
                check_registered("arch", kwargs[key], f"{where}:{key}")
        declare(kwargs.get("conditions"), f"{where}:conditions")


def _check_train(train: Mapping[str, Any], network: Mapping[str, Any], own_model: bool) -> None:
    import torch
    from basicsr.models import lr_scheduler

    optim = train["optim_g"]
    optimizer = getattr(torch.optim, optim["type"], None)
    if not (inspect.isclass(optimizer) and issubclass(optimizer, torch.optim.Optimizer)):
        known = [n for n, c in vars(torch.optim).items() if inspect.isclass(c)]
        raise UserError(
            f"option train:optim_g:type: there is no {optim['type']!r}; {did_you_mean(optim['type'], known)}"
        )
    check_call(optimizer, {k: v for k, v in optim.items() if k != "type"}, "train:optim_g", given=1)
    scheduler = train.get("scheduler")
    if scheduler is not None:
        known = ("MultiStepLR", "MultiStepRestartLR", "CosineAnnealingRestartLR")
        if scheduler["type"] not in known:
            hint = did_you_mean(scheduler["type"], known)
            raise UserError(f"option train:scheduler:type: there is no {scheduler['type']!r}; {hint}")
        name = scheduler["type"].replace("MultiStepLR", "MultiStepRestartLR")
        check_call(
            getattr(lr_scheduler, name), {k: v for k, v in scheduler.items() if k != "type"}, "train:scheduler", given=1
        )
    for key, value in train.items():
        if key.endswith("_opt") and value is not None:
            check_registered("loss", value, f"train:{key}")
    predictor = train.get("predictor") or {}
    for key in ("lr", "frozen"):
        if predictor.get(key) and own_model and network.get("predictor", {}) is None:
            raise UserError(f"option train:predictor:{key}: network_g has no predictor; remove it")
    if predictor.get("frozen") and (predictor.get("lr") or train.get("initial_opt")):
        other = "predictor:lr" if predictor.get("lr") else "initial_opt"
        raise UserError(f"option train:{other} has no meaning for a predictor that is frozen; remove one of them")
    if own_model and not train.get("diffusion_opt"):
        raise UserError("option train:diffusion_opt is missing (the loss on the predicted noise)")
    if not own_model and scheduler is None:
        raise UserError("option train:scheduler is missing")


def _check_conditions(opt: Mapping[str, Any]) -> None:
    """What the network is to be told against what the data sets tell, as far as they say."""
    denoiser = opt["network_g"].get("denoiser")
    declared = declare(denoiser.get("conditions")) if isinstance(denoiser, Mapping) else ()
    for phase, dataset in opt["datasets"].items() if declared else ():
        tells = getattr(registry.lookup("dataset", dataset["type"]), "tells", None)
        if tells is not None and phase.split("_")[0] != "test":
            check_told(declared, tells(dataset), phase == "train", f"option datasets:{phase}")


_OWN_TRAIN = (
    "ema_start", "diffusion_opt", "initial_opt", "variance_opt", "predictor", "grad_clip", "accumulate", "amp",
    "max_bad_steps",
)  # fmt: skip


def _drop_own(train: dict, given: Mapping[str, Any], model_type: str) -> None:
    """Keep what only UCDIRModel understands away from other models; BasicSR's own would ignore it."""
    of_basicsr = registry.lookup("model", model_type).__module__.startswith("basicsr.")
    for key in _OWN_TRAIN:
        if of_basicsr and given.get(key) is not None:
            own = "DiffusionPriorModel" if key == "variance_opt" else "UCDIRModel"
            raise UserError(f"option train:{key} is for {own}; {model_type} would ignore it")
        if key not in given:
            del train[key]


def _check_bird(opt: dict, raw: Mapping[str, Any]) -> None:
    """What BIRDModel has no use for, and what the keys of ``bird`` say together; sets ``scale`` to the task's."""
    from ucdir_plugin.diffusion.tasks import preset, task_named

    if (raw.get("val") or {}).get("sampling"):
        raise UserError("option val:sampling has no meaning for BIRDModel: bird:settings says how it samples")
    del opt["network_g"]
    opt["bird"] = opt["bird"] or BirdOptions().model_dump()
    bird = opt["bird"]
    try:
        task = task_named(bird["task"])
        preset(bird["preset"])
    except UserError as err:
        raise UserError(f"option bird: {err}") from err
    if bird["mask"] is not None and not task.holes:
        raise UserError(f"option bird:mask: only the task inpaint has holes, not {bird['task']}; remove it")
    if bird["network"] is not None:
        check_registered("arch", {"type": "ADMUNet", **bird["network"]}, "bird:network")
    stage = bird["first_stage"]
    if stage is not None and (stage["model"] is None) == (stage["images"] is None):
        raise UserError("option bird:first_stage: give model (an option or model file) or images (a folder)")
    if stage is not None and stage["weights"] is not None and stage["model"] is None:
        raise UserError("option bird:first_stage:weights go with model")
    if raw.get("scale", task.factor) != task.factor:
        raise UserError(f"option scale: {bird['task']} makes images {task.factor} times as large; remove scale")
    opt["scale"] = task.factor


def _check_engine(opt: dict) -> None:
    """What the engine cannot run, and the section ``mmengine``."""
    if opt["engine"] == "basicsr":
        if opt.pop("mmengine") is not None:
            raise UserError("option mmengine has no meaning for engine: basicsr; set engine: mmengine, or remove it")
        return
    if opt["model_type"] not in _KNOWN_MODELS:
        known = ", ".join(sorted(_KNOWN_MODELS))
        raise UserError(f"engine: mmengine runs {known}; {opt['model_type']} is a loop of BasicSR: remove engine")
    opt["mmengine"] = opt["mmengine"] or MMEngineOptions().model_dump()
    own, train = opt["mmengine"], opt.get("train") or {}
    if any(own.values()):
        from ucdir_plugin.mm.settings import check_settings  # it needs MMEngine's runner

        check_settings(own)
    if own["optim_wrapper"]:
        for key, instead in (("accumulate", "accumulative_counts"), ("amp", "its own precision")):
            if train.get(key) not in (None, 1):
                raise UserError(f"option train:{key} has no meaning for mmengine:optim_wrapper, which has {instead}")
    if own["param_scheduler"] and (train.get("scheduler") or train.get("warmup_iter", -1) > 0):
        raise UserError("option mmengine:param_scheduler: remove train:scheduler and train:warmup_iter")


def import_custom(raw: Mapping[str, Any], trust: bool) -> None:
    """Import the packages that ``mmengine: custom_imports`` names.

    Raises:
        UserError: if the options are not trusted, or one cannot be imported.
    """
    section = raw.get("mmengine")
    for name in (section.get("custom_imports") or ()) if isinstance(section, dict) else ():
        if not trust:
            raise UserError(
                f"option mmengine:custom_imports runs the code of {name!r}; if you trust it, add --trust-config"
                " (tools/train.py, tools/test.py)"
            )
        try:
            importlib.import_module(str(name))
        except Exception as err:  # whatever the module does
            raise UserError(f"option mmengine:custom_imports: {name}: {type(err).__name__}: {err}") from err


def _merge(given: Mapping, checked: Mapping) -> dict:
    """The checked values and defaults, and beside them what a foreign model or dataset has of its own."""
    merged = dict(given)
    for key, value in checked.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def check_options(raw: Any, is_train: bool, where: str = "options") -> dict:
    """Check an option mapping and complete it with defaults.

    Raises:
        UserError: one line that names the first fault and its cure.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a mapping of options is expected")
    check_plain(raw, where)
    raw = {key: value for key, value in raw.items() if value is not None}  # a section left empty
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        fault = " is missing" if model_type is None else f": a model's name is expected, got {model_type!r}"
        raise UserError(f"{where}: option model_type{fault}")
    for key in ("network_g", "diffusion", "train", "compile"):
        if model_type == "BIRDModel" and raw.get(key):
            raise UserError(
                f"{where}: option {key} has no meaning for BIRDModel, which restores without training; remove it"
            )
    blind = model_type == "BIRDModel"
    own_model = model_type in _FOREIGN
    prior = model_type == "DiffusionPriorModel"
    diffusion = raw.get("diffusion", {})
    if isinstance(diffusion, dict):
        cosine = diffusion.get("type") == "cosine"
        for key in {"start", "end"} & diffusion.keys() if cosine else ():
            raise UserError(f"{where}: option diffusion:{key} has no meaning for type cosine; remove it")
        if prior:
            raw["diffusion"] = {**PriorScheduleOptions().model_dump(), **diffusion}
    datasets = raw.get("datasets") if isinstance(raw.get("datasets"), dict) else {}
    try:
        checked = Options.model_validate_json(_to_json(raw, where)).model_dump()
    except ValidationError as err:

        def foreign(error: dict) -> bool:
            """An option of a foreign model or dataset, which has its own idea of what it needs."""
            if error["type"] != "extra_forbidden":
                return False
            loc = error["loc"]
            if loc[0] == "datasets" and len(loc) > 2:
                kind = datasets[loc[1]].get("type") if isinstance(datasets.get(loc[1]), dict) else None
                return isinstance(kind, str) and kind not in _MEANINGLESS
            return model_type not in _KNOWN_MODELS

        faults = [e for e in err.errors() if not foreign(e)]
        if faults:
            raise UserError(f"{where}: {_explain(faults[0])}") from err
        known = _without({tuple(e["loc"]) for e in err.errors()}, raw)
        checked = Options.model_validate_json(_to_json(known, where)).model_dump()
    opt = _merge(raw, checked)
    if opt["diffusion"]["type"] == "cosine":
        del opt["diffusion"]["start"], opt["diffusion"]["end"]
    if opt["manual_seed"] is None:
        opt["manual_seed"] = 0
    # BasicSR's datasets ask whether a key is there at all.
    opt["datasets"] = {p: {k: v for k, v in d.items() if v is not None} for p, d in opt["datasets"].items()}
    for dataset in opt["datasets"].values():
        if "batch_size_total" not in dataset:  # else share_batch says what is left for each
            dataset.setdefault("batch_size_per_gpu", 1)
    try:
        registry.lookup("model", opt["model_type"], "option model_type")
        if blind:
            _check_bird(opt, raw)
        else:
            for key, missing in (("network_g", True), ("bird", False)):
                if (opt[key] is None) == missing:
                    fault = "is missing" if missing else f"is for BIRDModel, not for {opt['model_type']}"
                    raise UserError(f"option {key} {fault}")
            del opt["bird"]
        _check_engine(opt)
        for key, cfg in opt.items():
            if key.startswith("network_"):
                check_registered("arch", cfg, key)
        for phase, dataset in opt["datasets"].items():
            if not re.fullmatch(r"(train|val|test)(_\w+)?", phase):
                raise UserError(f"option datasets:{phase}: the phases are train, val, val_2, ..., test, test_2, ...")
            registry.lookup("dataset", dataset["type"], f"option datasets:{phase}:type")
            for key in sorted(_MEANINGLESS.get(dataset["type"], set()) & {k for k, v in datasets[phase].items() if v}):
                raise UserError(f"option datasets:{phase}:{key} has no meaning for {dataset['type']}; remove it")
            if dataset.get("batch_size_total") is not None:
                total = f"option datasets:{phase}:batch_size_total"
                if phase.split("_")[0] != "train":
                    raise UserError(f"{total} is for training: images of {phase} are restored one by one; remove it")
                if datasets[phase].get("batch_size_per_gpu") is not None:
                    raise UserError(
                        f"{total} and batch_size_per_gpu exclude each other: remove one, or give it as ~ (nothing)"
                    )
            if dataset.get("degradations") is not None:
                chain(dataset["degradations"], f"datasets:{phase}:degradations")
        if is_train and own_model:
            _check_conditions(opt)
        for name, metric in (opt["val"].get("metrics") or {}).items():
            check_metric(metric, f"val:metrics:{name}")
            metric.setdefault("better", protocol.better(metric))
        if is_train:
            if "train" not in opt["datasets"]:
                raise UserError("option datasets:train is missing")
            if not opt.get("train"):
                raise UserError("option train is missing")
        if opt.get("train"):
            _check_train(opt["train"], opt["network_g"], own_model)
            path = opt["path"]
            if path["pretrain_network_predictor"] and opt["network_g"].get("predictor") is None:
                raise UserError("option path:pretrain_network_predictor: network_g has no predictor; remove it")
            if path["pretrain_network_predictor"] and path["pretrain_network_g"] and is_train:
                raise UserError(
                    "option path:pretrain_network_predictor: pretrain_network_g holds the predictor too; remove one"
                )
            if not own_model:
                _drop_own(opt["train"], raw["train"], opt["model_type"])
        for path in _FOREIGN.get(opt["model_type"], ()):
            place: Any = raw
            for key in path.split(":"):
                place = place.get(key) if isinstance(place, dict) else None
            if place is not None:
                raise UserError(f"option {path} has no meaning for {opt['model_type']}; remove it")
        if not prior:
            del opt["val"]["samples"]
        training = (PriorScheduleOptions if prior else ScheduleOptions)(**opt["diffusion"]).schedule()
        _check_sampling(SamplingOptions(**opt["val"]["sampling"]), training)
        if blind:
            del opt["diffusion"], opt["val"]["sampling"], opt["compile"]
        elif not own_model:
            if opt["network_g"].get("conditions"):
                raise UserError(f"option network_g:conditions is for UCDIRModel; {opt['model_type']} gives none")
            if opt["compile"]:
                raise UserError(f"option compile is for UCDIRModel; {opt['model_type']} would ignore it")
            del opt["diffusion"], opt["val"]["sampling"], opt["compile"]
    except UserError as err:
        raise UserError(f"{where}: {err}") from err
    return opt


def share_batch(dataset: Dict[str, Any], processes: int) -> None:
    """Set ``batch_size_per_gpu`` of a training set in place, where ``batch_size_total`` is given.

    Args:
        processes: that train together, or GPUs of one process.

    Raises:
        UserError: if the total is no multiple of ``processes``.
    """
    total = dataset.get("batch_size_total")
    if total is None:
        return
    if total % processes:
        near = next(n for n in range(processes, 0, -1) if total % n == 0)
        below, above = total // processes * processes, (total // processes + 1) * processes
        totals = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"option datasets:train:batch_size_total: {total} is no multiple of the {processes} processes: take {near}"
            f" of them, or a total of {totals}"
        )
    dataset["batch_size_per_gpu"] = total // processes


def check_metric(cfg: Mapping[str, Any], where: str) -> None:
    """A metric's keyword arguments, without the images and ``better``, which says which way is up."""
    target = registry.lookup("metric", cfg["type"], f"option {where}:type")
    parameters = inspect.signature(target).parameters
    known = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n not in ("img", "img2", "lq")]
    for key in cfg:
        if key not in (*known, "type", "better"):
            raise UserError(f"unknown option {where}:{key}; {did_you_mean(key, [*known, 'better'])}")
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in cfg:
            raise UserError(f"option {where}:{name} is missing ({cfg['type']} needs it)")
    border = cfg.get("crop_border", 0)
    if isinstance(border, bool) or not isinstance(border, int) or border < 0:
        raise UserError(f"option {where}:crop_border: a whole number of pixels, 0 or more, is expected, got {border!r}")
    for key, choices in (("input_order", ("HWC", "CHW")), ("convert_to", ("y", "gray"))):  # of BasicSR's metrics
        if key in cfg and cfg[key] not in choices:
            raise UserError(f"option {where}:{key}: {cfg[key]!r} is not known: take {' or '.join(choices)}")
    if not _is_own(target):
        return
    check_call(target, {k: v for k, v in cfg.items() if k != "type"}, where, len(parameters) - len(known), own=True)
    try:
        protocol.stamp(cfg)
    except NotAvailable:
        pass  # said when it is to be measured
    except UserError as err:
        raise UserError(f"option {where}: {err}") from err


def _without(paths: set, node: Any, here: tuple = ()) -> Any:
    if not isinstance(node, dict):
        return node
    return {k: _without(paths, v, (*here, k)) for k, v in node.items() if (*here, k) not in paths}


def read_yaml_file(path: str) -> dict:
    """A mapping from a file of plain YAML.

    Raises:
        UserError: if it is missing, no plain YAML, or no mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_TEXT + 1)
    except (OSError, ValueError) as err:
        raise UserError(
            f"option file {path} cannot be read: {getattr(err, 'strerror', None) or 'it is no text'}"
        ) from err
    raw = read_yaml(text, path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a mapping of options is expected")
    return raw


def read_options(path: str, above: Tuple[str, ...] = ()) -> dict:
    """An option file on top of the one that it names as ``_base_``, relative to its own folder (as in MMEngine).

    Mappings are merged; where both have a ``type`` and it differs, the file's own replaces that of the base.
    Nothing is checked yet.

    Raises:
        UserError: if a file cannot be read.
    """
    if os.path.realpath(path) in above:
        raise UserError(f"option file {path}: it is its own _base_")
    raw = read_yaml_file(path)
    base = raw.pop("_base_", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"{path}: _base_: the path of one option file is expected, got {base!r}")
    return _on_top(read_options(os.path.join(os.path.dirname(path), base), (*above, os.path.realpath(path))), raw)


def _on_top(base: dict, changes: dict) -> dict:
    if changes.get("type", base.get("type")) != base.get("type"):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _on_top(base[key], value) if both else value
    return merged


def option_text(path: str) -> str:
    """An option file as one that needs no other: as it is, or, where it names a ``_base_``, both merged."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if "_base_" not in read_yaml_file(path):
        return text
    return f"# {path} on top of its _base_\n{yaml.safe_dump(read_options(path), sort_keys=False)}"


def load_options(path: str, overrides: Optional[List[str]] = None, is_train: bool = True, trust: bool = False) -> dict:
    """Read, override and check an option file; its ``_base_`` is the option file that it changes.

    Args:
        trust: whether it may import packages.

    Raises:
        UserError: if it is missing, no plain YAML, or has a fault.
    """
    raw = read_options(path)
    apply_overrides(raw, overrides)
    import_custom(raw, trust)
    return check_options(raw, is_train, os.path.basename(path))
