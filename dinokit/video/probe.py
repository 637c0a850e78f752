"""Heads on frozen features of the frames of a clip. Two kinds, each with a baseline without time.

A head that pools over frames without their positions in time gives the same answer for any order of them.
`time=False` builds such a head, as a baseline. A head that tells a clip from its reversal has used the order.

    b  clips     T  frames     P  places of a frame     D  width     C  classes
"""

from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["flat", "attentive"]
HIDDEN, KEPT, JOINT = 64, 8, 128  # of the flat head
WIDTH, HEADS, BLOCKS = 96, 4, 2  # of the attentive head


class FlatProbe(nn.Module):
    """A small network on each place, then one on all of them: place and time are the order of its inputs.

    With little to learn between a move and its class, it learns from a few hundred clips. The number of
    parameters grows with T * P.
    """

    def __init__(self, frames: int, places: int, width: int, classes: int, time: bool = True) -> None:
        super().__init__()
        self.time = time
        self.each = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, KEPT)
        )
        joint = (frames if time else 1) * places * KEPT
        self.all = nn.Sequential(nn.Linear(joint, JOINT), nn.GELU(), nn.Linear(JOINT, classes))

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Features (b, T, P, D), and which frames are no repetition (b, T) bool, to logits (b, C)."""
        x = self.each(tokens) * real[:, :, None, None]
        if not self.time:
            x = x.sum(dim=1, keepdim=True) / real.sum(dim=1).view(-1, 1, 1, 1)
        logits: Tensor = self.all(x.flatten(1))
        return logits


class AttentiveProbe(nn.Module):
    """Blocks of attention over all places of all frames, and one query: as for large data sets of clips.

    The protocol of frozen video features (V-JEPA, arXiv 2404.08471, and InternVideo2, arXiv 2403.15377), with
    learned positions in place and time.
    """

    def __init__(self, frames: int, places: int, width: int, classes: int, time: bool = True) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH))
        self.place = nn.Parameter(0.02 * torch.randn(1, 1, places, WIDTH))
        self.time = nn.Parameter(0.02 * torch.randn(1, frames, 1, WIDTH)) if time else None
        self.blocks = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(BLOCKS)
            ]
        )
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.pool = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.classify = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes))

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Features (b, T, P, D), and which frames are no repetition (b, T) bool, to logits (b, C)."""
        x = self.project(tokens) + self.place
        if self.time is not None:
            x = x + self.time
        absent = ~real[:, :, None].expand(x.shape[:3]).flatten(1)
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=absent)
        query = self.query.expand(len(x), -1, -1)
        pooled = self.pool(query, x, x, key_padding_mask=absent, need_weights=False)[0]
        logits: Tensor = self.classify(pooled[:, 0])
        return logits


def build_probe(
    kind: Kind, frames: int, places: int, width: int, classes: int, time: bool = True
) -> FlatProbe | AttentiveProbe:
    """A head with the weights of torch's own random numbers.

    Args:
        kind: flat or attentive.
        frames: T.
        places: P.
        width: D.
        classes: C.
        time: False: the logits of a clip are those of its frames in any order.

    Raises:
        ValueError: if there is no such head.
    """
    heads: dict[str, type[FlatProbe] | type[AttentiveProbe]] = {
        "flat": FlatProbe,
        "attentive": AttentiveProbe,
    }
    if kind not in heads:
        raise ValueError(f"There is no head '{kind}'; there is: {', '.join(heads)}.")
    return heads[kind](frames, places, width, classes, time)
