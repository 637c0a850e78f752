"""The formats of others and our own, a file each.

A format that can be read defines

    read(file: Checkpoint, heads: int | None) -> Found | None

It gives None if the file is of another format. If it is of this one but does not tell what it must, it raises
ValueError with the second half of a sentence, which the file's name begins.

One that can be written defines

    write(vit: VisionTransformer, out: Path, size: int | None) -> Written

It writes to `out`, where nothing is, and opens again what it wrote with the library that the format is for.
"""
