"""Images with masks of objects, as evaluators open them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from dinokit.config import registry
from dinokit.data.objects import ObjectSource
from dinokit.eval._images import count_shared
from dinokit.features import spread
from dinokit.models import Backbone
from dinokit.runtime.log import info
from dinokit.segment.saved import SavedHead


def open_objects(section: Mapping[str, Any] | None, key: str, backbone: Backbone, limit: int) -> ObjectSource:
    """The source of a section; at most `limit` images, evenly drawn; 0 is all.

    Raises:
        ValueError: if there is no section, or it has no image.
    """
    if not section or not section.get("name"):
        raise ValueError(f"{key}.name must be given; there is: {', '.join(registry.names('data.objects'))}.")
    keys = {item.name for item in fields(registry.find("data.objects", section["name"]).Config)}
    channels = {"channels": backbone.channels} if "channels" in keys else {}
    source: ObjectSource = registry.build("data.objects", {**section, **channels})
    if not len(source):
        raise ValueError(f"{key}.name={section['name']} has no image.")
    return cast(ObjectSource, spread(cast(Any, source), limit))  # a Subset gives what its source gives


def count_trained(cfg: Any, about: SavedHead, test: ObjectSource, backbone: Backbone) -> int:
    """How many test images a head was trained on. Raises as count_shared().

    Where its training images cannot be opened, that is logged.
    """
    try:
        registry.check_from_file(about.objects, cfg.head, "the head")
        trained = open_objects(about.objects, "objects", backbone, 0)
    except (OSError, ValueError, LookupError) as error:
        info(f"The images that {cfg.head} was trained on were not compared with the test images: {error}")
        return 0
    return count_shared(cfg, trained, test)
