"""A backbone as a transformer of scikit-learn: images in, one feature vector each out."""

from typing import Any, Literal, Self

import numpy as np

from dinokit.api import encode
from dinokit.models import Backbone
from dinokit.runtime.device import pick_device
from dinokit.weights import load_backbone

PARAMETERS = ("weights", "tokens", "size", "batch", "device", "unit", "precision")


class Embedder:
    """Feature vectors of images for pipelines of scikit-learn, which need not be installed.

    make_pipeline(Embedder("runs/photos"), LogisticRegression()).fit(files, labels)

    It learns nothing: fit() only loads the weights. Images are a list of paths, Pillow images, arrays or
    tensors, an array (n, h, w, C), or whatever else dinokit.encode() takes.

    Args:
        weights: whatever load_backbone() reads, or a backbone.
        tokens: cls, or mean (of the patches).
        size: pixels of the centre crop; 0: as trained.
        batch: images at a time.
        device: cpu, cuda, or auto.
        unit: scale vectors to length 1.
        precision: as of dinokit.encode().
    """

    def __init__(
        self, weights: Any = "", tokens: str = "cls", size: int = 0, batch: int = 64, device: str = "auto",
        unit: bool = False, precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    ) -> None:  # fmt: skip
        self.weights, self.tokens, self.size = weights, tokens, size
        self.batch, self.device, self.unit, self.precision = batch, device, unit, precision

    def fit(self, images: Any = None, labels: Any = None) -> Self:
        """Load the weights. Neither images nor labels are used.

        Raises:
            LookupError, ValueError: if there are no such weights.
        """
        loaded = self.weights if isinstance(self.weights, Backbone) else load_backbone(self.weights)
        self.backbone_ = loaded.to(pick_device(self.device))
        self.n_features_out_ = self.backbone_.width
        return self

    def transform(self, images: Any) -> np.ndarray:
        """(n, D) float32, in the order of the images.

        Raises:
            ValueError: if an image cannot be read.
        """
        if not hasattr(self, "backbone_"):
            self.fit()
        x = encode(
            self.backbone_, images, self.tokens, size=self.size, batch=self.batch, precision=self.precision
        )
        x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) if self.unit else x
        return np.asarray(x.numpy(), np.float32)

    def fit_transform(self, images: Any, labels: Any = None) -> np.ndarray:
        """fit(), then transform()."""
        return self.fit(images, labels).transform(images)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {key: getattr(self, key) for key in PARAMETERS}

    def set_params(self, **params: Any) -> Self:
        """Set arguments of the constructor; the weights are loaded again when they are needed.

        Raises:
            ValueError: if there is no such argument.
        """
        have = self.get_params()
        for key, value in params.items():
            if key not in have:
                raise ValueError(f"Embedder has no parameter '{key}'; it has {', '.join(have)}.")
            setattr(self, key, value)
        self.__dict__.pop("backbone_", None)
        return self

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns: dino0, dino1, ..."""
        if not hasattr(self, "backbone_"):
            self.fit()
        return np.array([f"dino{i}" for i in range(self.n_features_out_)], object)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import (  # noqa: PLC0415 - only scikit-learn calls this
            InputTags,
            Tags,
            TargetTags,
            TransformerTags,
        )

        inputs = InputTags(one_d_array=True, two_d_array=False, three_d_array=True, string=True)
        return Tags(
            estimator_type="transformer", target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=[]), input_tags=inputs, requires_fit=False,
            no_validation=True,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if not isinstance(self.weights, Backbone):
            state.pop("backbone_", None)  # it is read again from its file
        return state

    def __repr__(self) -> str:
        changed = ", ".join(f"{key}={value!r}" for key, value in self.get_params().items())
        return f"Embedder({changed})"
