"""dinokit models [PATTERN | identify FILE | join FILE FILE out=FILE]: list released models, identify files.

The list shows name, parameters, patch size, licence, whether the file is in the cache of torch.hub, and URL.
identify prints the format of a file, its backbone, and whether all its tensors are used. heads=N gives the
number of attention heads where a file does not. join writes one file with several encoders, whose features
are concatenated: the grid is that of the first.

dinokit models 'dinov2*'
dinokit models identify dinov2_vits14_pretrain.pth
dinokit models join dinov2_vits14_pretrain.pth SIGLIP_FOLDER out=both.safetensors
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

from dinokit.commands import Command
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least, suggest
from dinokit.hub import RELEASED
from dinokit.runtime.files import printable


@dataclass
class Config:
    heads: int = 0  # of attention, for identify and join, where a file does not say
    out: str = ""  # the file that join writes

    def __post_init__(self) -> None:
        check_at_least(self, heads=0)


def run(command: Command) -> dict[str, Any]:
    cfg = Config(**checked_values(Config, parse_overrides(command.settings)))
    if command.words[:1] == ["join"]:
        return _join(command.words[1:], cfg)
    if cfg.out:
        raise ValueError("out= is for dinokit models join FILE FILE out=FILE.")
    if command.words[:1] == ["identify"]:
        return _identify(Command(command.words[1:], []).one_word("file of weights"), cfg.heads or None)
    if command.settings:
        raise ValueError(f"{command.settings[0]}: only dinokit models identify and join take settings.")
    if len(command.words) > 1:
        near = suggest(command.words[0], ["identify", "join"])
        raise ValueError(
            f"'{' '.join(command.words)}' is more than one pattern.{near} dinokit models --help."
        )
    pattern = command.words[0] if command.words else "*"
    names = [name for name in RELEASED if fnmatch(name, pattern)]
    if not names:
        raise LookupError(
            f"No released model is called '{pattern}'.{suggest(pattern, list(RELEASED))} There is: "
            f"{', '.join(RELEASED)}."
        )
    _list(names)
    return {"models": {name: asdict(RELEASED[name]) for name in names}}


def words() -> Sequence[str]:
    return ["identify", "join", *RELEASED]


def describe(words: Sequence[str]) -> str:
    return f"models: {', '.join(RELEASED)}"


def _list(names: Sequence[str]) -> None:
    from dinokit.hub.entry import cached_path

    print(f"{'name':<23}{'parameters':>14}  patch  {'licence':<16}{'here':<6}source")
    for name in names:
        model = RELEASED[name]
        here = "yes" if cached_path(model.url).is_file() else "no"
        print(f"{name:<23}{model.parameters:>14,}  {model.patch:>5}  {model.licence:<16}{here:<6}{model.url}")
    print("DINOv2's have a linear classifier of ImageNet-1k besides: NAME_lc, with layers=1 or layers=4; and")
    print(
        "those without registers depth heads: NAME_ld (linear), NAME_dd (DPT), of indoor or outdoor images, "
        "and segmentation heads: NAME_seg, of ADE20K or VOC2012."
    )
    print(
        "Meta gives DINOv3's files to who accepts its licence, and none is ever downloaded here: give "
        "weights=PATH, or put the file into the cache of torch.hub."
    )
    print(
        f"In Python: torch.hub.load(DINOKIT, '{names[0]}', source='local'), DINOKIT being a clone of dinokit."
    )


def _join(sources: Sequence[str], cfg: Config) -> dict[str, Any]:
    if len(sources) < 2 or not cfg.out.endswith(".safetensors"):
        raise ValueError("Give two files or more and where to write: join FILE FILE out=NAME.safetensors.")
    from dinokit.models.joined import Joined
    from dinokit.weights import describe, load_backbone, save_backbone

    heads = cfg.heads or None
    both = Joined([load_backbone(source, heads=heads) for source in sources])
    of = [describe(source, heads=heads)["backbone"] for source in sources]
    save_backbone(cfg.out, both, {"name": "joined", "of": of, "channels": both.channels})
    widths = " + ".join(str(part.width) for part in both.parts)
    print(printable(f"Written: {cfg.out}: {widths} = {both.width} channels, patches of {both.patch} pixels"))
    return {"out": cfg.out, "width": both.width, "patch": both.patch}


def _identify(source: str, heads: int | None) -> dict[str, Any]:
    from dinokit.weights.checkpoint import open_checkpoint
    from dinokit.weights.formats.native import check_digest
    from dinokit.weights.load import build, coverage, read, refusal

    def show(line: str) -> None:
        print(printable(line))

    file, stored = read(source, heads=heads, values=False)
    backbone = build(file.path, stored)
    fit = coverage(backbone, stored.tensors)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    shown = stored.input
    show(f"{'file':<13}{file.path}")
    show(f"{'format':<13}{stored.format}")
    show(f"{'backbone':<13}{', '.join(f'{key}={value}' for key, value in stored.section.items())}")
    show(f"{'parameters':<13}{count:,}")
    show(f"{'input':<13}{shown.size} pixels, mean {_list_of(shown.mean)}, std {_list_of(shown.std)}")
    show(f"{'coverage':<13}{fit}")
    if stored.licence:
        show(f"{'licence':<13}{stored.licence}")
    if stored.ignored:
        show(f"{'also there':<13}{', '.join(stored.ignored)}")
    for note in stored.notes:
        show(f"{'note':<13}{note}")
    if "sha256" in file.metadata:
        check_digest(open_checkpoint(file.path))
        show(f"{'checksum':<13}matches")
    if not fit.complete:
        raise ValueError(refusal(file.path, stored, fit))
    return {
        "file": file.path,
        "format": stored.format,
        "backbone": stored.section,
        "parameters": count,
        "input": {"size": shown.size, "mean": shown.mean, "std": shown.std},
        "coverage": str(fit),
        "licence": stored.licence,
        "notes": stored.notes,
    }


def _list_of(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
