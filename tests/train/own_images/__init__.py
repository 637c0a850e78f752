"""A source of images in a package of its own, as a user may have."""
