"""Builds a training set from a pool of images by retrieval (DINOv2, arXiv 2304.07193, section 3).

Conventions of this package: vectors are on the unit sphere, and a similarity is a cosine. Whatever is as long
as the pool lies on disk and is read in pieces.

n  images of the pool     D  width of the embeddings     q  queries     k  neighbours
"""
