"""Whether a run learns: signals of each step and of each evaluation, and a sentence when something is wrong.

The DINO loss is a cross-entropy CE = H + KL: the entropy H of the teacher's targets, and what the student
does not predict of them. CE near ln K can mean uniform targets (H near ln K) or noise (H low, KL high).

A direction of the head's features grows only if two crops of an image agree in it more than the ratio of the
temperatures, rho* = teacher_temp / student_temp. Near uniform outputs both softmaxes are linear: the best
prediction of targets d / teacher_temp is rho * d / teacher_temp, so the direction is multiplied by rho / rho*
each time the teacher follows the student. Above 1 it grows, below 1 it vanishes.

G  global crops      B  images on this process      D  width      K  prototypes
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.config.load import Recipe
from dinokit.data.batch import stack
from dinokit.data.decode import UNREADABLE
from dinokit.data.sources import ImageSource
from dinokit.data.transforms import center_crop
from dinokit.features.tokens import device_of, normalised
from dinokit.losses import Views
from dinokit.models import Backbone

ENTROPY_CHUNK = 2**22  # probabilities whose logarithms are in memory at a time
LEAST_VARIANCE = 1e-4  # of features of unit length: below it, rounding in bf16 looks like directions
PROBED = 160  # images of an evaluation: a share of variance is then known to about a tenth of itself
PROBED_AT_ONCE = 32

# When a verdict is given.
LEAST_STEPS = 50  # before, and during the warm-up of the rate, signals are those of the initial weights
RECENT = 5  # records of steps that are averaged: from one batch of 32 images rho is known to 0.1 at best
GROWTH = 1.15  # in simulations rows with a spread of 0.2 grow from 1.15 * rho* on, not from rho*
NEAR_LN_K = 0.97  # of ln K: the demo that learnt nothing in its DINO term ended at 0.99
ONE_PROTOTYPE = 1.5  # of K in use: between one and two
# Of head rows of length 1: 0.2 to 1 where outputs differ, at most 0.03 where all are alike.
LEAST_SPREAD = 0.05
LEAST_RANK = 1.2  # rows on a line have 1, untrained networks 1.5 to 2
# Share of the class token's variance that brightness explains: 0.5 to 0.85 in untrained networks, 0.03 to
# 0.41 in runs on satellite images, CIFAR-10 and scenes whose accuracy rose.
BRIGHT = 0.6
BRIGHT_AGREES = 0.5  # less, and crops of an image differ in brightness more than images do
PATCH_ORDER = 0.01  # share of variance: networks that did not depend on shapes had 0.3 %
ALIKE = 0.98  # mean cosine of two images: 0.99 cost k-NN two to five points in runs on photographs
PATCH_ORDER_STEPS = 500  # before, positions (at first of rms 0.02) cannot have grown
LEAST_KL = 0.1  # of ln K: with less the student predicts the targets
FLAT_SCORE, FLAT_LOSS = 0.005, 0.02  # accuracy; share of ln K, or of the loss where there is no K
DROP = 0.02  # of the k-NN accuracy: more than the noise of 1,000 test images
EPOCHS = 10  # passes over the images; with fewer their number does not limit a run


@torch.no_grad()
def step_signals(
    views: Views, losses: Mapping[str, Tensor], crops: Tensor, student_temp: float | None
) -> dict[str, Tensor]:
    """Signals of one forward pass as scalars on its device, without waiting for it.

    Args:
        views: after the losses have seen them.
        losses: by name.
        crops: the global crops (G*B, C, S, S), normalised.
        student_temp: of the DINO loss, if there is one.

    Returns:
        feature_rank: effective rank of the student's class tokens. With two global crops or more,
        brightness_agreement: rho of their mean brightness alone. With a DINO loss, target_entropy: H in nats;
        kl: CE - H; prototypes_used: exp of the entropy of the mean target; crop_agreement: rho of the
        teacher's head rows; crop_agreement_needed: rho*; head_spread: how far these rows, of length 1, are
        from their mean (root of the mean square).
    """
    count, images = views.student_feature.shape[:2]
    signals = {"feature_rank": effective_rank(views.student_feature.flatten(0, 1))}
    if count > 1:
        brightness = crops.flatten(1).mean(dim=1, dtype=torch.float32)
        signals["brightness_agreement"] = agreement(brightness.view(count, images, 1))
    targets = views.class_targets
    if not targets or student_temp is None:
        return signals
    signals["target_entropy"] = mean_entropy(targets)
    signals["kl"] = losses["dino"].detach() - signals["target_entropy"]
    signals["prototypes_used"] = prototypes_used(targets)
    if count > 1:
        signals["crop_agreement"] = rho = agreement(views.teacher_cls.rows)
        signals["crop_agreement_needed"] = rho.new_full((), views.teacher_temp / student_temp)
    signals["head_spread"] = spread(views.teacher_cls.rows)
    return signals


def agreement(x: Tensor) -> Tensor:
    """Rho of x (G, B, d): 1 minus the variance between the crops of an image over that of all rows. ()."""
    x = x.float()
    within = x.var(dim=0).sum(dim=-1).mean()  # unbiased: 0 is expected of unrelated crops
    return 1 - within / x.flatten(0, 1).var(dim=0).sum().clamp_min(torch.finfo().tiny)


def spread(x: Tensor) -> Tensor:
    """Root mean square distance of rows x (..., d) from their mean. ()."""
    return x.float().flatten(0, -2).var(dim=0, correction=0).sum().sqrt()


def effective_rank(x: Tensor) -> Tensor:
    """Participation ratio of rows x (R, D) of unit length: how many directions hold their variance. ().

    With eigenvalues l of the covariance, (sum l)^2 / sum l^2: D for isotropic rows, 1 for rows on a line, and
    near 0 for rows that are all alike. At most R - 1.
    """
    x = F.normalize(x.float(), dim=1)
    x = x - x.mean(dim=0)
    gram = (x @ x.T if len(x) < x.shape[1] else x.T @ x) / len(x)  # both have the eigenvalues l
    return gram.trace().square() / (gram.square().sum() + LEAST_VARIANCE**2)


def mean_entropy(targets: Sequence[Tensor]) -> Tensor:
    """Mean entropy, in nats, of probabilities (R, K) in slices (R, k). ()."""
    parts = [
        torch.special.entr(rows).sum()
        for target in targets
        for rows in target.split(max(ENTROPY_CHUNK // target.shape[1], 1))
    ]
    return torch.stack(parts).sum() / len(targets[0])


def prototypes_used(targets: Sequence[Tensor]) -> Tensor:
    """Exp of the entropy of the mean of probabilities (R, K) in slices: 1 to K. ()."""
    return torch.stack([torch.special.entr(target.mean(dim=0)).sum() for target in targets]).sum().exp()


class Probe:
    """An evaluator of a run that needs no labels: what the class token depends on.

    Args:
        source: the images of the run; PROBED of them are read once, and unreadable ones left out.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.crops = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, backbone: Backbone) -> dict[str, float]:
        """Signals of a backbone.

        Returns:
            shuffled_patches: share of the class token's variance between images that shuffling the patches of
            each image moves; 1 if the class token of the shuffled image has nothing to do with it.
            feature_rank: effective_rank(). brightness_share: share of the variance that a cubic function of
            the image's brightness explains. common_share: share of the class token that all images have in
            common, the square of their mean's length: near 1, cosines hardly tell images apart.
        """
        size = backbone.input.size
        if self.crops.shape[-1] != size:
            self.crops = self._read(size)
        generator = torch.Generator().manual_seed(0)
        count = (size // backbone.patch) ** 2
        order = torch.stack([torch.randperm(count, generator=generator) for _ in self.crops])
        whole, shuffled, brightness = [], [], []
        for crops, places in zip(self.crops.split(PROBED_AT_ONCE), order.split(PROBED_AT_ONCE), strict=True):
            x = normalised(backbone, crops.to(device_of(backbone)))
            brightness.append(x.flatten(1).mean(dim=1))
            whole.append(_class_tokens(backbone, x))
            shuffled.append(_class_tokens(backbone, shuffle_patches(x, backbone.patch, places)))
        a, b, light = torch.cat(whole), torch.cat(shuffled), torch.cat(brightness)
        spread = (a - a.mean(dim=0)).square().sum().clamp_min(torch.finfo().tiny)
        light = (light - light.mean()) / light.std(correction=0).clamp_min(torch.finfo().tiny)
        # Powers, because features that depend on brightness alone lie on a curve, not on a line.
        powers = torch.linalg.qr(torch.stack([light**n for n in range(4)], dim=1).cpu().double())[0][:, 1:]
        return {
            "shuffled_patches": float((a - b).square().sum() / 2 / spread),
            "feature_rank": float(effective_rank(a)),
            "brightness_share": float((powers.T @ a.cpu().double()).square().sum() / spread),
            "common_share": float(a.mean(dim=0).square().sum()),
        }

    def _read(self, size: int) -> Tensor:
        """The centres of some images, (n, C, size, size) uint8, or float32 in [0, 1]."""
        rows = []
        for index in torch.randperm(len(self.source), generator=torch.Generator().manual_seed(0))[:PROBED]:
            try:
                rows.append(center_crop(self.source[int(index)][0], size, size))
            except UNREADABLE:  # the loader reports it
                continue
        return stack(rows)


def shuffle_patches(x: Tensor, patch: int, order: Tensor) -> Tensor:
    """The images x (b, C, S, S) with their N patches in another order (b, N)."""
    columns = F.unfold(x, patch, stride=patch)  # (b, C * patch * patch, N)
    columns = columns.gather(2, order.to(x.device)[:, None].expand_as(columns))
    return F.fold(columns, x.shape[-2:], patch, stride=patch)


def _class_tokens(backbone: Backbone, x: Tensor) -> Tensor:
    return F.normalize(backbone([x], [None])[0].cls.float(), dim=1)


class Verdict(NamedTuple):
    """What is wrong with a run."""

    name: str  # noise, one output, one prototype, rank collapse, shortcut, nothing left, data-bound, alike
    text: str  # a sentence with the reason, and a remedy


def diagnose(records: Sequence[Mapping[str, Any]], recipe: Recipe, images: int) -> Verdict | None:
    """The first thing that is wrong with a run by its records so far, or None.

    Args:
        records: of metrics.jsonl, in order.
        recipe: of the run.
        images: of its source.
    """
    history = History(records, recipe)
    if history.step < max(LEAST_STEPS, recipe.optim.warmup):
        return None
    verdicts = (check(history, images) for check in CHECKS)
    return next((verdict for verdict in verdicts if verdict), None)


class History:
    """The records of a run, as the checks below read them; what was not recorded is NaN, which fails none."""

    def __init__(self, records: Sequence[Mapping[str, Any]], recipe: Recipe) -> None:
        self.recipe, self.records = recipe, records
        self.steps = [record for record in records if "lr" in record]
        self.step = int(self.steps[-1]["step"]) if self.steps else 0
        self.loss = "dino" if "dino" in recipe.losses else next(iter(recipe.losses))
        self.prototypes = recipe.heads.cls.prototypes if self.loss == "dino" else 0
        self.log_k = math.log(self.prototypes) if self.prototypes else math.nan
        knn = next((key for record in records for key in record if key.startswith("knn/top1@")), "")
        self.scores = [(int(record["step"]), float(record[knn])) for record in records if knn in record]

    def recent(self, name: str, step: int | None = None) -> float:
        """The mean of a signal over the last records until `step`, once LEAST_STEPS were logged with it."""
        until = self.step if step is None else step
        known = [(r["step"], float(r[name])) for r in self.steps if r.get(name) is not None]
        known = [(at, value) for at, value in known if at <= until]
        if not known or until - known[0][0] < LEAST_STEPS:
            return math.nan
        values = [value for _, value in known[-RECENT:]]
        return sum(values) / len(values)

    def noisy(self) -> bool:
        """Whether two crops of an image agree too little for features to grow."""
        return self.recent("crop_agreement") < GROWTH * self.recent("crop_agreement_needed")

    def probed(self, name: str) -> float:
        """A signal of the last evaluation after the start."""
        key = f"health/{name}"
        values = [record[key] for record in self.records if record["step"] and key in record]
        return float(values[-1]) if values else math.nan

    def fall(self, step: int) -> float:
        """By how many times what counts as flat the loss fell since `step`."""
        before, now = self.recent(self.loss, step), self.recent(self.loss)
        return (before - now) / (FLAT_LOSS * (before if math.isnan(self.log_k) else self.log_k))


def _one_prototype(h: History, _: int) -> Verdict | None:
    used = h.recent("prototypes_used")
    if not used < ONE_PROTOTYPE:
        return None
    return Verdict(
        "one prototype",
        f"the targets use {used:.1f} of {h.prototypes} prototypes, so every image has the same answer. Set "
        f"losses.dino.targets=sinkhorn, or with centering a lower losses.dino.center_momentum or a higher "
        f"teacher.temp.",
    )


def _one_output(h: History, _: int) -> Verdict | None:
    spread, loss = h.recent("head_spread"), h.recent("dino")
    standardized = h.recipe.heads.cls.standardize
    if not (spread < LEAST_SPREAD and loss > NEAR_LN_K * h.log_k) or standardized or h.noisy():
        return None
    return Verdict(
        "one output",
        f"the head gives nearly the same output for every image (head_spread {spread:.3f}), so its targets "
        f"say nothing: the DINO loss of {loss:.2f} stays at ln K = {h.log_k:.2f}, although crops of an image "
        f"agree. Set heads.cls.standardize=true, and heads.patch.standardize=true if there is a patch head, "
        f"in a new run.out.",
    )


def _noise(h: History, _: int) -> Verdict | None:
    rho, needed, loss = (h.recent(name) for name in ("crop_agreement", "crop_agreement_needed", "dino"))
    if not (h.noisy() and loss > NEAR_LN_K * h.log_k):
        return None
    return Verdict(
        "noise",
        f"two crops of an image agree too little (crop_agreement {rho:.2f}; features grow only clearly above "
        f"teacher.temp / losses.dino.student_temp = {needed:.2f}), so noise drives the outputs to uniform: "
        f"the DINO loss of {loss:.2f} stays at ln K = {h.log_k:.2f}. Raise losses.dino.student_temp to 0.2, "
        f"or make crops more alike: weaker colour jitter, a larger crops.globals.scale.",
    )


def _brightness(h: History, _: int) -> Verdict | None:
    rho, share = h.recent("brightness_agreement"), h.probed("brightness_share")
    if not (rho > BRIGHT_AGREES and share > BRIGHT):
        return None
    return Verdict(
        "shortcut",
        f"brightness alone agrees between two crops by {rho:.2f} and explains {share:.0%} of the variance of "
        f"class tokens, so little else has to be learnt. Raise crops.brightness (now "
        f"{h.recipe.crops.brightness:g}) and crops.contrast (now {h.recipe.crops.contrast:g}).",
    )


def _rank(h: History, _: int) -> Verdict | None:
    probed = h.probed("feature_rank")
    rank = h.recent("feature_rank") if math.isnan(probed) else probed
    if not rank < LEAST_RANK:
        return None
    return Verdict(
        "rank collapse",
        f"the class tokens vary in {rank:.1f} directions only (effective rank). Add losses.koleo.weight=0.1, "
        f"or raise it, or lower optim.lr.",
    )


def _patch_order(h: History, _: int) -> Verdict | None:
    share = h.probed("shuffled_patches")
    if not (share < PATCH_ORDER and h.step >= PATCH_ORDER_STEPS):
        return None
    return Verdict(
        "shortcut",
        f"shuffling the patches of an image moves its class token by {share:.1%} of the variance: it depends "
        f"on colours and textures, and not on shapes. Begin a run with backbone.init=fan_in "
        f"backbone.positions=sincos, or train longer.",
    )


def _data_bound(h: History, images: int) -> Verdict | None:
    epochs = h.step * h.recipe.optim.batch / images
    if not h.scores or epochs <= EPOCHS:
        return None
    best_step, best = max(h.scores, key=lambda each: each[1])
    if h.scores[-1][1] >= best - DROP or not h.fall(best_step) > 1:
        return None
    return Verdict(
        "data-bound",
        f"the loss still falls while the k-NN accuracy fell from {best:.3f} at step {best_step} to "
        f"{h.scores[-1][1]:.3f}, after {epochs:.0f} passes over {images} images. Use more images, stronger "
        f"augmentations, a smaller backbone, or optim.steps={best_step}.",
    )


def _nothing_left(h: History, _: int) -> Verdict | None:
    kl, entropy, half = h.recent("kl"), h.recent("target_entropy"), h.step // 2
    early = [score for step, score in h.scores if step <= half]
    late = [score for step, score in h.scores if step > half]
    if not (kl < LEAST_KL * h.log_k and early and late and h.fall(half) <= 1):
        return None
    if max(late) > max(early) + FLAT_SCORE:
        return None
    return Verdict(
        "nothing left",
        f"the student predicts the targets (KL {kl:.2f} of a loss of {kl + entropy:.2f}), and neither loss "
        f"nor k-NN accuracy improved since step {half}. Make the task harder: smaller crops.globals.scale "
        f"and crops.locals.scale, more colour jitter, more prototypes, a lower teacher.temp.",
    )


def _alike(h: History, _: int) -> Verdict | None:
    share = h.probed("common_share")
    if not (share > ALIKE and h.step >= 0.9 * h.recipe.optim.steps) or "koleo" in h.recipe.losses:
        return None
    return Verdict(
        "alike",
        f"the class tokens of two images have a mean cosine of {share:.3f}, so k-NN, retrieval and search by "
        f"cosines see little of what was learnt. Add losses.koleo.weight=0.1 to a new run, or subtract the "
        f"mean of all features.",
    )


# In this order: the first that finds something gives the verdict.
CHECKS = (
    _one_prototype, _brightness, _rank, _one_output, _noise, _patch_order, _data_bound, _nothing_left, _alike
)  # fmt: skip
