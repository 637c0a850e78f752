"""Curation: from a heap of images to a training set, by retrieval (DINOv2, arXiv 2304.07193, section 3).

What the files here share: rows are on the unit sphere, a similarity is a cosine, and whatever is as long as
the pool lies on disk and is read in pieces.

n  images of the pool     D  width of the embeddings     q  queries     k  neighbours
"""
