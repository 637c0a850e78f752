"""What is put on frozen features: small modules that turn them into classes or depth.

Parameter names are those of DINOv2's released heads, so their files load with strict=True. For hubconf.py:
dinokit.heads.released has what the entry points `_ld`, `_dd` (depther) and `_seg` (segmenter) return.
"""
