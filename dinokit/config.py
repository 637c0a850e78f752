"""The recipe: what a run is, as dataclasses; the one file where OmegaConf enters, and where it stops.

A recipe is a YAML file in configs/ or anywhere else, completed by `key=value` overrides and by the defaults below.
Sections that name a file on a shelf (`backbone`, `losses`, `data`, `evals`) are checked against that file's Config.
Nothing here imports torch, so a mistake is answered at once.

Units, everywhere: a duration is in optimiser steps, a batch is images over all processes, a size is in pixels, and
a pair [a, b] of a schedule is a cosine from a to b.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinokit import shelves


@dataclass
class Head:
    """A projection head: an MLP, the unit sphere, prototypes (DINO, arXiv 2104.14294, appendix C)."""

    prototypes: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3  # linear layers before the prototypes
    norm_last_layer: bool = False  # hold every prototype's length at 1


@dataclass
class Heads:
    cls: Head = field(default_factory=Head)
    patch: Head | None = None  # none: masked patches go through the class token's head


@dataclass
class Teacher:
    momentum: tuple[float, float] = (0.992, 1.0)  # of the moving average that the teacher is
    temp: tuple[float, float] = (
        0.04,
        0.07,
    )  # softmax temperature: a straight line over temp_warmup steps, then flat
    temp_warmup: int = 0
    temp_every: int = 1  # steps between two changes of the temperature; DINO changes it once an epoch


@dataclass
class CropGroup:
    count: int = 2
    size: int = 224
    scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    blur: tuple[float, ...] = (0.5,)  # probability: one for all crops of the group, or one a crop
    solarize: tuple[float, ...] = (0.0,)


@dataclass
class Crops:
    """Multi-crop augmentation (DINO, section 3.1); the defaults are those that DINO and DINOv2 share."""

    globals: CropGroup = field(default_factory=CropGroup)
    locals: CropGroup = field(default_factory=lambda: CropGroup(count=8, size=96, scale=(0.05, 0.32)))
    ratio: tuple[float, float] = (0.75, 4 / 3)  # of width to height, drawn evenly in its logarithm
    flip: float = 0.5  # probability of a mirror image
    vertical_flip: float = 0.0
    jitter: float = 0.8  # probability that the next four apply; each of those is a strength, 0 is off
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2  # needs RGB
    hue: float = 0.1  # needs RGB
    gray: float = 0.2  # probability; needs RGB
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    blur_kernel: int = 9  # pixels, odd
    solarize_threshold: float = 128 / 255  # in [0, 1]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # one a channel, in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass
class Masks:
    """Block masks over the student's global crops (BEiT, arXiv 2106.08254; iBOT, arXiv 2111.07832)."""

    images: float = 0.5  # share of global crops that get a mask
    patches: tuple[float, float] = (
        0.1,
        0.5,
    )  # share of a masked crop's patches, spread evenly over the batch


@dataclass
class Optim:
    """AdamW and the clock."""

    steps: int = MISSING
    batch: int = MISSING  # images per step over all processes, never per GPU
    lr: float = MISSING  # peak, for a batch of `lr_batch` images
    lr_batch: int = 1024
    lr_rule: Literal["none", "sqrt", "linear"] = "sqrt"
    warmup: int = 0
    min_lr: float = 1e-6
    weight_decay: tuple[float, float] = (0.04, 0.4)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0  # largest gradient norm; 0 is off
    clip_per: Literal["part", "tensor"] = (
        "part"  # part: backbone and each head; DINO clips every tensor by itself
    )
    layer_decay: float = 1.0  # block i of n trains at lr * layer_decay ** (n - i)
    patch_lr: float = 1.0  # factor on the patch embedding's learning rate
    head_frozen: int = 0  # the prototypes stand still for so many steps at the start
    head_freeze: Literal["lr", "gradient"] = "lr"  # by a zero rate (DINOv2) or by leaving them out (DINO)

    @property
    def peak_lr(self) -> float:
        """lr, moved from `lr_batch` to `batch` images by `lr_rule`."""
        ratio = self.batch / self.lr_batch
        return self.lr * {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[self.lr_rule]


@dataclass
class Run:
    """Where and how; nothing here but `seed`, `precision` and `accumulate` changes what is learnt."""

    out: str = ""  # the run's folder; empty is runs/NAME-OF-THE-RECIPE
    seed: int = 0
    device: str = "auto"  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 where the device computes in it
    accumulate: int = 1  # parts that a step's batch is cut into, one after another (docs/training.md)
    workers: int = -1  # processes that load images; -1: one a core but one, 16 at most; 0: none
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints
    max_unreadable: float = 0.01  # share of images that may be unreadable before the run stops


@dataclass
class Recipe:
    name: str = MISSING
    backbone: dict[str, Any] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    losses: dict[str, Any] = field(default_factory=dict)
    teacher: Teacher = field(default_factory=Teacher)
    crops: Crops = field(default_factory=Crops)
    masks: Masks | None = None
    data: dict[str, Any] = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)
    evals: dict[str, Any] = field(default_factory=dict)
    run: Run = field(default_factory=Run)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, a path or a name in configs/, and apply `key=value` overrides.

    An override that changes the `name` of a section starts that section from the new file's defaults.

    Raises:
        ValueError, LookupError: for an unknown recipe, key or name, a value that does not fit, a missing value, or
            settings that contradict each other; each names the key and the way out.
    """
    path = _recipe_path(recipe)
    values = _read_yaml(path)
    values.setdefault("name", path.stem)
    _merge(values, parse_overrides(overrides), "")
    return _complete(values)


def load_recipe_text(text: str) -> Recipe:
    """The recipe that to_yaml() wrote.

    Raises:
        ValueError, LookupError: as load_recipe().
    """
    values: Any = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict)
    return _complete(values)


def _complete(values: dict[str, Any]) -> Recipe:
    values = {**values, **{key: values.get(key) or {} for key in ("backbone", "losses", "data", "evals")}}
    done = Recipe(**_typed(Recipe, values, ""))
    done.backbone = _section("backbones", values.get("backbone"), "backbone")
    done.data = _section("data.sources", values.get("data"), "data")
    done.losses = {
        name: section_values("losses", name, section or {}, f"losses.{name}")
        for name, section in done.losses.items()
        if section is not None
    }
    done.evals = {
        name: _eval_section(name, section or {})
        for name, section in done.evals.items()
        if section is not None
    }
    inside = [
        value for section in done.evals.values() for value in section.values() if isinstance(value, dict)
    ]
    for source in (done.data, *inside):
        if "channels" in source and "channels" in done.backbone:
            source["channels"] = done.backbone["channels"]
    done.run.out = done.run.out or f"runs/{done.name}"
    _check(done)
    return done


def section_values(shelf: str, name: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` of a section, checked against the Config of shelf/name and completed by its defaults.

    A field of that Config with metadata {"shelf": ...} is itself a section, or none. One with a "split" is a labelled
    source: without a name, a folder with one sub-folder a class.

    Raises:
        ValueError, LookupError: as `load_recipe`; `where` is put before the key.
    """
    cls = shelves.read_config(shelf, name)
    done = _typed(cls, values, where)
    for item in fields(cls):
        if "shelf" in item.metadata and done[item.name]:
            section = done[item.name]
            if "split" in item.metadata and "name" not in section:
                section = {"name": "folder", "labels": "folders", **section}
            done[item.name] = _section(item.metadata["shelf"], section, _join(where, item.name))
    return done


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """['a.b=1', ...] as a nested dict; values are YAML.

    Raises:
        ValueError: if one has no '='.
    """
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"'{text}' is not of the form key=value.")
    try:
        done: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:  # the YAML reader's own errors have no common base that OmegaConf exports
        raise ValueError(
            f"These overrides cannot be read: {' '.join(overrides)}: {_first_line(error)}"
        ) from None
    assert isinstance(done, dict)
    return done


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, every default filled in; `load_recipe` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def recipe_names() -> list[str]:
    """The recipes in configs/, sorted."""
    return sorted(p.name.removesuffix(".yaml") for p in _shipped().iterdir() if p.name.endswith(".yaml"))


def _shipped() -> Any:
    return files("dinokit.configs")


def _recipe_path(recipe: str | Path) -> Path:
    text = str(recipe)
    if text in recipe_names():
        return Path(str(_shipped() / f"{text}.yaml"))
    if Path(text).is_file():
        return Path(text)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        raise LookupError(f"There is no recipe file '{text}' (looked from {Path.cwd()}).")
    raise LookupError(
        f"There is no recipe '{text}'.{shelves.suggest(text, recipe_names())} Recipes are: {', '.join(recipe_names())}; "
        f"or give the path of a YAML file."
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # as in parse_overrides
        raise ValueError(f"{path} is not a recipe: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it should hold the sections {_list(Recipe)}.")
    return values


def _merge(values: dict[str, Any], changes: Mapping[str, Any], where: str) -> None:
    for key, change in changes.items():
        old = values.get(key)
        if not isinstance(change, Mapping) or not isinstance(old, dict):
            values[key] = change
            continue
        renamed = (where == "" and key in ("backbone", "data")) or "." in _join(where, key)
        if renamed and change.get("name", old.get("name")) != old.get("name"):
            values[key] = dict(change)
        else:
            _merge(old, change, _join(where, key))


def _section(shelf: str, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values.get("name"):
        raise ValueError(f"{where}.name must be given; there is: {', '.join(shelves.names(shelf))}.")
    rest = {key: value for key, value in values.items() if key != "name"}
    name = str(values["name"])
    try:
        return {"name": name, **section_values(shelf, name, rest, where)}
    except LookupError as error:
        raise LookupError(f"{where}.name: {error}") from None


def _eval_section(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    where = f"evals.{name}"
    if not isinstance(values, Mapping) or not isinstance(values.get("every"), int) or values["every"] < 1:
        raise ValueError(
            f"{where}.every must be given: the number of steps between two evaluations, 1 or more."
        )
    rest = {key: value for key, value in values.items() if key != "every"}
    return {"every": values["every"], **section_values("eval", name, rest, where)}


def _typed(cls: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    _unknown_keys(cls, values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(values)))
        absent = sorted(str(key) for key in OmegaConf.missing_keys(merged))
        if absent:
            keys = [_join(where, key) for key in absent]
            raise ValueError(f"{' and '.join(keys)} must be given, as in {keys[0]}=VALUE.")
        done = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{_culprit(cls, values, where)}: {_first_line(error)}.") from None
    return {item.name: getattr(done, item.name) for item in fields(cls)}


def _culprit(cls: type[Any], values: Mapping[str, Any], where: str) -> str:
    """The key whose value does not fit: OmegaConf's error does not always name it."""
    for item in fields(cls):
        if item.name in values:
            key, value = _join(where, item.name), values[item.name]
            try:
                OmegaConf.merge(OmegaConf.structured(cls), {item.name: value})
            except OmegaConfBaseException:
                inner = _dataclass_of(item)
                return _culprit(inner, value, key) if inner and isinstance(value, Mapping) else key
    return where


def _unknown_keys(cls: type[Any], values: object, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}={values}: it is a section, which may hold: {_list(cls) or 'nothing'}.")
    known = {item.name: item for item in fields(cls)}
    for key, value in values.items():
        if key not in known:
            inside = f" in '{where}'" if where else ""
            raise ValueError(
                f"{_join(where, str(key))}: there is no key '{key}'{inside}."
                f"{shelves.suggest(str(key), list(known))} There is: {_list(cls) or 'nothing to set'}."
            )
        inner = _dataclass_of(known[key])
        if inner is not None and value is not None:
            _unknown_keys(inner, value, _join(where, key))


def _dataclass_of(item: "Field[Any]") -> type[Any] | None:
    options = getattr(item.type, "__args__", (item.type,))
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _check(recipe: Recipe) -> None:
    _check_losses(recipe)
    optim, crops, run = recipe.optim, recipe.crops, recipe.run
    for key, value in {"optim.steps": optim.steps, "optim.batch": optim.batch, "run.accumulate": run.accumulate,
                       "crops.globals.count": crops.globals.count, "run.log_every": run.log_every,
                       "run.checkpoint_every": run.checkpoint_every, "run.keep": run.keep}.items():  # fmt: skip
        if value < 1:
            raise ValueError(f"{key}={value}: it must be 1 or more.")
    if optim.warmup >= optim.steps:
        raise ValueError(f"optim.warmup={optim.warmup} leaves nothing of optim.steps={optim.steps}.")
    if optim.batch % run.accumulate:
        raise ValueError(
            f"optim.batch={optim.batch} cannot be cut into run.accumulate={run.accumulate} equal parts."
        )
    for name, group in {"globals": crops.globals, "locals": crops.locals}.items():
        for key in ("blur", "solarize"):
            given = getattr(group, key)
            if len(given) not in (1, group.count) and group.count:
                raise ValueError(
                    f"crops.{name}.{key} gives {len(given)} probabilities for crops.{name}.count={group.count} crops: "
                    f"give one for all, or one a crop."
                )
    if len(crops.mean) != len(crops.std):
        raise ValueError(f"crops.mean has {len(crops.mean)} channels, crops.std has {len(crops.std)}.")
    if crops.blur_kernel % 2 == 0:
        raise ValueError(f"crops.blur_kernel={crops.blur_kernel} must be odd.")


def _check_losses(recipe: Recipe) -> None:
    if not recipe.losses:
        raise ValueError(
            f"losses is empty, so there is nothing to learn from. There is: {_shelf_list('losses')}."
        )
    configs = {name: shelves.read_config("losses", name) for name in recipe.losses}
    masked = [name for name, cls in configs.items() if "masks" in getattr(cls, "uses", ())]
    if masked and recipe.masks is None:
        raise ValueError(f"losses.{masked[0]} learns from masked patches, but there is no section `masks`.")
    for key, value in {"masks": recipe.masks, "heads.patch": recipe.heads.patch}.items():
        if value is not None and not masked:
            raise ValueError(
                f"`{key}` is given, but no loss of this recipe reads it; take it out with {key}=null."
            )
    part = recipe.optim.batch // recipe.run.accumulate
    for name, cls in configs.items():
        least = getattr(cls, "least_images", 1)
        if part < least:
            raise ValueError(
                f"losses.{name} needs {least} images at a time, but optim.batch={recipe.optim.batch} in "
                f"run.accumulate={recipe.run.accumulate} parts gives {part}. Raise optim.batch, or drop it with "
                f"losses.{name}=null."
            )


def _shelf_list(shelf: str) -> str:
    return ", ".join(shelves.names(shelf))


def _list(cls: type[Any]) -> str:
    return ", ".join(f"{f.name}{' (must be given)' if _required(f) else ''}" for f in fields(cls))


def _required(item: "Field[Any]") -> bool:
    return item.default == MISSING or (item.default is NO_DEFAULT and item.default_factory is NO_DEFAULT)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where and key else where or key


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
