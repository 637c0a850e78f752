"""Write a vit in the format of another library, open it there, and measure that it says the same."""

from collections.abc import Iterator
from pathlib import Path

from dinokit.models import Backbone
from dinokit.models.vit import VisionTransformer
from dinokit.runtime.files import aside, remove
from dinokit.weights.formats import dinov2, huggingface, onnx, timm
from dinokit.weights.written import TOLERANCE, Written, difference

WRITERS = {"timm": timm.write, "hf": huggingface.write, "dinov2": dinov2.write, "onnx": onnx.write}


def export(backbone: Backbone, to: str, out: str | Path, size: int | None = None) -> Iterator[str]:
    """Write a backbone, and say in sentences what was written and how far it is the same.

    What stands at `out` is replaced once the new one was opened and compared, and stays if anything fails.

    Args:
        backbone: a vit, in eval mode.
        to: timm, hf, dinov2 or onnx.
        out: a file to write; for hf, and for timm unless it ends in .safetensors, a folder.
        size: pixels of the images that an ONNX graph takes; None: any multiple of the patch.

    Raises:
        ValueError: if the backbone is no vit, or what was written does not say the same; it then lies in the
            folder `out`.wrong.
        RuntimeError: if a library is not there; it says what to install.
        OSError: if the files cannot be written.
    """
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(f"Only a `vit` can be exported, and this backbone is a {type(backbone).__name__}.")
    out = Path(out)
    with aside(out) as folder:
        written = WRITERS[to](backbone, folder / out.resolve().name, size)
        try:
            said = list(_compared(backbone, written))
        except ValueError as error:
            wrong = out.resolve().with_name(f"{out.resolve().name}.wrong")
            remove(wrong)
            folder.rename(wrong)
            raise ValueError(f"{error} It lies in {wrong}; nothing was done to {out}.") from None
    yield f"Written: {out}"
    yield from said
    yield from written.notes
    yield f"Open it with: {written.command(out)}"


def _compared(vit: VisionTransformer, written: Written) -> Iterator[str]:
    for size in written.sizes:
        gap, largest = difference(vit, written, size)
        text = f"Largest difference at {size} x {size} pixels: {gap:.1e} (values up to {largest:.2g})."
        if gap <= TOLERANCE * max(largest, 1.0):
            yield text
        elif size == written.sizes[0] or written.every_size:
            raise ValueError(f"What was written does not say what the backbone says. {text}")
        else:
            yield f"{text} There the positional embedding is resampled, by another rule than the vit's."
