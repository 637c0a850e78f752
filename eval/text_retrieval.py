"""Retrieval between images, or videos, and captions by the cosine of a text alignment (`dinokit align`).

Each image looks for its captions among those of all images, and each caption for its image: recall@k is the
share that has a right one among the first k (CLIP, arXiv 2103.00020). Captions describe the whole image.
A caption that several images share is right for each of them.

A caption with the colours of two things exchanged has the same words as the right one: whoever reads a bag of
words is right in exactly half of these (as in Winoground, arXiv 2204.03162).

The vector of a video is the mean of those of its frames (CLIP4Clip's mean pooling, arXiv 2104.08860). It does
not know their order: a video and the same backwards have one vector, so of captions that differ in a
direction it cannot choose. The frame in the middle alone is the baseline.

    N  images     M  captions     E  width of the common space
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config import registry
from dinokit.config.registry import check_at_least, source_field
from dinokit.data.clips import Clip
from dinokit.eval._align import vectors_of
from dinokit.features import Subset, spread
from dinokit.language.aligned import Aligned, load_aligned
from dinokit.models import Backbone
from dinokit.runtime.log import watch
from dinokit.video.sampling import Sampling

FRAMES = 8  # of a video
TIE = 1e-5  # of cosines: the sum over words depends on their order in its last bits


@dataclass
class Config:
    test: dict[str, Any] | None = source_field("data.captions", "test", labels=False)
    align: str = ""  # the folder of a run of dinokit align, on these weights
    k: tuple[int, ...] = (1, 5, 10)  # of recall@k
    frames: int = 0  # of a video, one from each of so many equal parts; 0: 8
    max_test: int = 0  # images, drawn evenly from the set; 0: all
    batch: int = 64  # images at a time

    def __post_init__(self) -> None:
        check_at_least(self, k=1, frames=0, max_test=0, batch=1)


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """Recall in both directions.

    Returns:
        'text recall@1' and so on, of images that look for captions; 'image recall@1', of captions that look
        for images; 'shuffled recall@1', of images with the captions of others, the level of chance; 'swap',
        of images with a caption whose colours can be exchanged: how often the right one is nearer, where the
        source has such captions, and 'swaps', their number; 'images_test', 'captions_test'. Of videos all are
        of the mean over frames, and 'middle frame text recall@1' and 'middle frame image recall@1' of one.

    Raises:
        ValueError, LookupError: if images and alignment do not fit; the message names the key to set.
    """
    if not cfg.align:
        raise ValueError("align=RUN must be given: the folder of a run of dinokit align on these weights.")
    if not cfg.test or not cfg.test.get("name"):
        raise ValueError(f"test.name must be given; there is: {', '.join(registry.names('data.captions'))}.")
    section = {**cfg.test, **({"channels": backbone.channels} if "channels" in cfg.test else {})}
    source: Any = registry.build("data.captions", section)
    videos = hasattr(source, "clip")
    if cfg.frames and not videos:
        raise ValueError(
            f"frames={cfg.frames}: test.name={section['name']} has images, and only videos have frames. "
            f"Leave frames out, or give videos: test.name=videos or test.name=moving."
        )
    chosen = spread(source, cfg.max_test)
    numbers = chosen.indices if isinstance(chosen, Subset) else range(len(source))
    if len(numbers) < 2:
        raise ValueError(f"test.name={section['name']} has fewer than two images: nothing to look for.")
    aligned = load_aligned(cfg.align, backbone)
    middle = vectors_of(aligned, chosen, cfg.batch)[0]
    images = pooled_frames(cfg, aligned, [source.clip(n) for n in numbers]) if videos else middle
    captions = [source.captions(number)[0] for number in numbers]
    texts = [*dict.fromkeys(text for each in captions for text in each)]
    right = pairs(captions, texts)
    vectors = aligned.text(texts).cpu()
    cosine = images @ vectors.T
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    scores = {f"text recall@{k}": recall(cosine, right, k) for k in cfg.k}
    scores |= {f"image recall@{k}": recall(cosine.T, right.T, k) for k in cfg.k}
    scores |= {f"shuffled recall@{k}": recall(cosine, right[order], k) for k in cfg.k[:1]}
    if videos:
        alone = middle @ vectors.T
        for key, table, fits in (("text", alone, right), ("image", alone.T, right.T)):
            scores |= {f"middle frame {key} recall@{k}": recall(table, fits, k) for k in cfg.k[:1]}
    scores |= swap_scores(aligned, source, numbers, images)
    return scores | {"images_test": len(images), "captions_test": len(texts)}


def pooled_frames(cfg: Config, aligned: Aligned, clips: Sequence[Clip]) -> Tensor:
    """The mean of the vectors of a clip's frames, on the unit sphere again, (N, E) on the CPU.

    Raises:
        OSError, ValueError: if a clip cannot be read, with its name.
    """
    sampling, rows = Sampling("even", cfg.frames or FRAMES), []
    for clip in watch(clips, len(clips), "videos"):
        taken, real = sampling(clip.seconds(range(len(clip))))
        frames = clip.frames([frame for frame, once in zip(taken, real, strict=True) if once])
        rows.append(aligned.image([*frames]).mean(dim=0).cpu())
    return F.normalize(torch.stack(rows), dim=1)


def pairs(captions: Sequence[Sequence[str]], texts: Sequence[str]) -> Tensor:
    """Which texts are captions of which images, (N, M) bool."""
    number = {text: j for j, text in enumerate(texts)}
    right = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for i, each in enumerate(captions):
        right[i, [number[text] for text in each]] = True
    return right


def recall(cosine: Tensor, right: Tensor, k: int) -> float:
    """The share of rows with a right column among the k of the greatest cosine; (N, M) both."""
    nearest = cosine.topk(min(k, cosine.shape[1]), dim=1).indices
    return float(right.gather(1, nearest).any(dim=1).float().mean())


def swap_scores(aligned: Aligned, source: Any, numbers: Sequence[int], images: Tensor) -> dict[str, float]:
    """How often the caption is nearer to its image than with two colours exchanged; a tie counts half."""
    if not hasattr(source, "exchanged"):
        return {}
    found = [(i, source.exchanged(number)) for i, number in enumerate(numbers)]
    rows = [(i, pair) for i, pair in found if pair is not None]
    if not rows:
        return {}
    right, wrong = (aligned.text([pair[side] for _, pair in rows]).cpu() for side in (0, 1))
    own = images[[i for i, _ in rows]]
    difference = (own * (right - wrong)).sum(dim=1)
    sign = torch.where(difference.abs() < TIE, 0, difference.sign())
    return {"swap": float((sign + 1).mean() / 2), "swaps": len(rows)}
