"""Images that cannot be read: each is named once, with the reason, and too many of them end the run."""

from collections.abc import Mapping, Sequence


class TooManyUnreadableError(RuntimeError):
    """More images than `run.max_unreadable` allows cannot be read."""


class Unreadable:
    """The unreadable images met so far.

    Args:
        share: of images that may be unreadable.
        images: in the source.
    """

    def __init__(self, share: float, images: int) -> None:
        self.share, self.images = share, images
        self.names: dict[str, str] = {}  # in the order met, each with the reason; "" from a checkpoint

    def add(self, found: Mapping[str, str], seen: int) -> list[str]:
        """Count the unreadable images of a batch. Returns a line for each that is new.

        Args:
            found: names of unreadable images, perhaps met before, and why each cannot be read.
            seen: images asked for since the start of the run.

        Raises:
            TooManyUnreadableError: if they are more than `share` of the source, or of the first thousand
                images seen.
        """
        new = {name: why for name, why in found.items() if name not in self.names}
        self.names.update(new)
        tried = min(self.images, max(seen, 1000))
        if new and len(self.names) > self.share * tried:
            reasons = list(dict.fromkeys(why.rstrip(".") for why in self.names.values() if why))
            listed = ", ".join(list(self.names)[:5])
            raise TooManyUnreadableError(
                f"{len(self.names)} of {tried} images cannot be read, more than "
                f"run.max_unreadable={self.share:g}: {listed}{', ...' if len(self.names) > 5 else ''}. "
                f"Why: {'; '.join(reasons[:3])}. "
                f"Mend that, remove the images, or allow more, such as "
                f"run.max_unreadable={min(1.0, 2 * len(self.names) / tried):.2g}."
            )
        return [f"cannot be read, left out: {name}: {why}" for name, why in new.items()]

    def state(self) -> list[str]:
        """For a checkpoint."""
        return list(self.names)

    def load(self, names: Sequence[str]) -> None:
        """From a checkpoint."""
        self.names = dict.fromkeys(names, "")
