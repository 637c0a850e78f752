"""dinokit doctor [FOLDER ...] [key=value ...]: check this machine and a sample of images before a training.

The machine: Python, torch, CUDA, driver and NCCL, optional packages and what each would add, cores, memory,
shared memory and disk. The images: count, formats, sizes, channels, bits, colours, EXIF orientation, and
those that are unreadable or duplicates; other kinds than folders and files as data.name=SOURCE data.path=...
Duplicates are searched within the sample. The exit status is 3 if there is a problem: an image that cannot be
read, or too little disk or shared memory to train.

dinokit doctor
dinokit doctor PHOTOS sample=2000
"""

import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, FailedError, key_lines
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least
from dinokit.config.values import with_source
from dinokit.runtime.files import printable

if TYPE_CHECKING:
    from dinokit.data.scan import Finding, Scan

EXTRAS = {  # packages, the command that installs them (in the clone), and what they add
    "faiss": ("faiss-cpu", "pip install '.[cpu]'", "dinokit curate and fast search in many images"),
    "pyarrow": ("pyarrow", "pip install '.[cpu]'", "images in Parquet files"),
    "xformers": ("xformers", "pip install '.[gpu]'", "faster attention on a GPU"),
    "onnx": ("onnx", "pip install '.[onnx]'", "dinokit export to=onnx"),
    "transformers": ("transformers", "pip install '.[huggingface]'", "dinokit export to=hf"),
    "datasets": ("datasets", "pip install '.[datasets]'", "data sets of Hugging Face"),
    "pydicom": ("pydicom", "pip install '.[dicom]'", "DICOM images"),
    "tifffile": ("tifffile", "pip install '.[tiff]'", "TIFF with many bands"),
    "pillow_heif": ("pillow-heif", "pip install '.[heic]'", "HEIC photos of phones"),
    "av": ("av", "pip install '.[video]'", "videos"),
    "gradio": ("gradio", "pip install '.[page]'", "dinokit click"),
    "tensorboard": ("tensorboard", "pip install '.[track]'", "run.log=[tensorboard]"),
}
ALSO = {"faiss": "faiss-gpu"}  # another distribution of the same package
LEAST_DISK, LEAST_SHARED = 2.0, 0.5  # GiB: checkpoints of a small run; batches between loader processes
BAR = 40  # characters of the longest bar of the histogram


@dataclass
class Config:
    data: dict[str, Any] | None = field(default=None, metadata={"registry": "data.sources"})
    sample: int = 500  # images that are read
    channels: int = 3  # as backbone.channels
    out: str = "."  # the folder whose disk a run would fill

    def __post_init__(self) -> None:
        check_at_least(self, sample=1, channels=1)


def run(command: Command) -> dict[str, Any]:
    values = parse_overrides(command.settings)
    if isinstance(values.get("data"), dict):
        values["data"] = with_source(values["data"])
    cfg = Config(**checked_values(Config, values))
    from dinokit.curate.hashing import scan_with_near_duplicates
    from dinokit.data.scan import findings
    from dinokit.data.sources.memory import as_source

    facts = machine(cfg.out)
    for key, value in facts.items():
        print(f"{key:<16}{value}")
    missing = packages()
    for line in missing.values():
        print(f"{'not installed':<16}{line}")
    found = machine_findings(cfg.out)
    scans = {}
    sections: list[Any] = [*command.words, *([cfg.data] if cfg.data else [])]
    for images in sections:
        name = images if isinstance(images, str) else str(images.get("path", images["name"]))
        result = scan_with_near_duplicates(as_source(images, cfg.channels), cfg.sample)
        print(f"\n{printable(name)}")
        for line in lines(result):
            print(line)
        scans[name] = result.facts()
        found += findings(result)
    print("\n" + ("\n".join(map(_sentence, found)) or "No problem was found."))
    report = {
        "machine": facts,
        "missing": missing,
        "data": scans,
        "findings": [asdict(each) for each in found],
    }
    problems = [each.name for each in found if each.problem]
    if problems:
        raise FailedError(f"problems were found: {', '.join(problems)}.", exit_status=3, result=report)
    return report


def _sentence(found: "Finding") -> str:
    return printable(f"{'problem' if found.problem else 'note'}: {found.text}")


def machine(out: str) -> dict[str, str]:
    """Facts about Python, torch, the GPU and what a run would use of this machine."""
    import torch

    from dinokit.runtime.distributed import cpu_cores, memory

    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "CUDA": f"{torch.version.cuda or 'torch is built without it'}",
        "driver": driver(),
        "NCCL": "none",
    }
    if torch.cuda.is_available():
        if torch.distributed.is_nccl_available():
            facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        for n in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(n)
            facts[f"GPU {n}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    facts["cores"] = f"{cpu_cores()}: {min(16, cpu_cores() - 1)} loader processes by default"
    facts["memory"] = f"{memory() / 2**30:.1f} GiB"
    if Path("/dev/shm").is_dir():
        facts["shared memory"] = f"{_free('/dev/shm'):.1f} GiB free"
    facts["disk"] = f"{_free(out):.1f} GiB free for {out}"
    return facts


def driver() -> str:
    """The version of NVIDIA's driver, or "none"."""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").splitlines()[0] if file.is_file() else "none"


def _free(folder: str) -> float:
    return shutil.disk_usage(_existing(folder)).free / 2**30


def _existing(folder: str) -> Path:
    """The folder, or the nearest one above it that exists."""
    place = Path(folder).resolve()
    return next(each for each in (place, *place.parents) if each.exists())


def packages() -> dict[str, str]:
    """What each missing optional package would add, and the command that installs it."""
    missing = {}
    for package, (name, install, adds) in EXTRAS.items():
        if not any(map(_installed, filter(None, [name, ALSO.get(package)]))):
            missing[package] = f"{package}, for {adds}: {install} in the clone of dinokit"
    return missing


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def machine_findings(out: str) -> list["Finding"]:
    """What of this machine would make a training fail or slow."""
    import torch

    from dinokit.data.scan import Finding

    found = []
    if (free := _free(out)) < LEAST_DISK:
        found.append(
            Finding("disk", True, f"Only {free:.1f} GiB are free for {out}; choose another run.out.")
        )
    if Path("/dev/shm").is_dir() and (free := _free("/dev/shm")) < LEAST_SHARED:
        text = f"Only {free:.2f} GiB of shared memory: use run.workers=0, or docker run --shm-size=8g."
        found.append(Finding("shared memory", True, text))
    if not torch.cuda.is_available() and (text := _unused_gpu(torch.version.cuda)):
        found.append(Finding("GPU", False, text))
    try:
        with TemporaryFile(dir=_existing(out)):
            pass
    except OSError as error:
        text = f"{out} cannot be written ({error.strerror}); choose another run.out."
        found.append(Finding("out", True, text))
    return found


def _unused_gpu(cuda: str | None) -> str:
    """Why torch, which is built for this CUDA, cannot use a GPU of NVIDIA; "" if there is none."""
    if driver() == "none":
        if not _nvidia_gpus():
            return ""
        return (
            "There is a GPU of NVIDIA but no driver for it, so torch computes on the CPU: install the driver "
            "(nvidia.com/drivers)."
        )
    if cuda is None:
        return "There is a driver of NVIDIA, but torch is built without CUDA: install another (pytorch.org)."
    return (
        f"There is a driver of NVIDIA, but torch for CUDA {cuda} cannot use a GPU. In a container: docker "
        f"run --gpus all. Else the driver may be too old or damaged: nvidia-smi says."
    )


def _nvidia_gpus() -> int:
    """GPUs of NVIDIA on the PCI bus, with or without a driver."""
    devices = Path("/sys/bus/pci/devices")
    found = 0
    for device in devices.iterdir() if devices.is_dir() else ():
        with suppress(OSError):
            kind, vendor = ((device / name).read_text().strip() for name in ("class", "vendor"))
            found += vendor == "0x10de" and kind.startswith("0x03")
    return found


def lines(result: "Scan") -> Iterator[str]:
    """What a scan saw, one fact a line, with a histogram of the shorter sides."""
    yield f"{'images':<16}{result.images:,}, of which {result.read:,} were read"
    for name, counts in (("formats", result.formats), ("stored as", result.modes)):
        if counts:
            yield f"{name:<16}{', '.join(f'{key}: {count}' for key, count in counts.most_common())}"
    if result.sizes:
        for name, values in zip(("width", "height"), zip(*result.sizes, strict=True), strict=True):
            yield f"{name:<16}{min(values):,} to {max(values):,} pixels"
        yield f"{'channel means':<16}{result.mean}, deviation {result.std}"
        yield "shorter side, in pixels:"
        most = max(count for _, count in result.histogram())
        for name, count in result.histogram():
            yield f"  {name:<14}{'#' * -(-BAR * count // most)} {count}"


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "doctor")])
