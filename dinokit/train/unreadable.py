"""Images that cannot be read: each is named once, and too many of them end the run."""

from collections.abc import Sequence


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
        self.names: dict[str, None] = {}  # in the order met

    def add(self, names: Sequence[str], seen: int) -> list[str]:
        """Count the unreadable images of a batch. Returns a line for each that is new.

        Args:
            names: of the unreadable images, perhaps met before.
            seen: images asked for since the start of the run.

        Raises:
            TooManyUnreadableError: if they are more than `share` of the source, or of the first thousand
                images seen.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.names]
        self.names.update(dict.fromkeys(new))
        tried = min(self.images, max(seen, 1000))
        if new and len(self.names) > self.share * tried:
            listed = ", ".join(list(self.names)[:5])
            raise TooManyUnreadableError(
                f"{len(self.names)} of {tried} images cannot be read, more than "
                f"run.max_unreadable={self.share:g}: {listed}{', ...' if len(self.names) > 5 else ''}. "
                f"Repair or remove them, or allow more, such as "
                f"run.max_unreadable={min(1.0, 2 * len(self.names) / tried):.2g}."
            )
        return [f"cannot be read, left out: {name}" for name in new]

    def state(self) -> list[str]:
        """For a checkpoint."""
        return list(self.names)

    def load(self, names: Sequence[str]) -> None:
        """From a checkpoint."""
        self.names = dict.fromkeys(names)
