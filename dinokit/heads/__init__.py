"""Heads on frozen features, for segmentation and depth.

Their parameter names are those of DINOv2's released heads, so the released files load with strict=True.
"""
