"""Formats of weights, one file each: those of other projects and our own.

A format that can be read defines

    read(file: Checkpoint, heads: int | None) -> StoredBackbone | None

It returns None if the file has another format. If the file has this format but its architecture cannot be
inferred, it raises ValueError with the second half of a sentence that starts with the name of the file.

One that can be written defines

    write(vit: VisionTransformer, out: Path, size: int | None) -> Exported

It writes to `out`, which does not exist, and opens the result with the library of the format.
"""
