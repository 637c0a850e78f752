"""What the evaluators of a list have said, kept until all have said theirs: the same command goes on."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dinokit.evaluation import Planned
from dinokit.runtime.distributed import broadcast, rank
from dinokit.runtime.files import write_text
from dinokit.runtime.log import info


class Said:
    """Lines by label. All processes make it together; process 0 writes.

    Args:
        folder: of the results; None keeps nothing.
        plan: the list, as it is before paths of this machine are filled in.
        fingerprint: of what is judged.
    """

    def __init__(self, folder: Path | None, plan: Sequence[Planned], fingerprint: str) -> None:
        same = [(each.label, each.name, each.values) for each in plan], fingerprint
        tag = blake2b(repr(same).encode(), digest_size=6).hexdigest()
        self.path = folder / f".list_{tag}.json" if folder is not None and len(plan) > 1 else None
        self.lines: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.is_file():
            self.lines = json.loads(self.path.read_text(encoding="utf-8"))
        self.lines = broadcast(self.lines)  # all judge the same ones
        if self.lines:
            info(f"goes on after {', '.join(self.lines)}; to judge these anew, delete {self.path}")

    def add(self, label: str, line: dict[str, Any]) -> None:
        """Keep the line of one more.

        Raises:
            OSError: if it cannot be written.
        """
        self.lines[label] = line
        if self.path is not None and rank() == 0:
            write_text(self.path, json.dumps(self.lines))

    def finish(self) -> None:
        """All have said theirs: the same command judges anew."""
        if self.path is not None and rank() == 0:
            self.path.unlink(missing_ok=True)
