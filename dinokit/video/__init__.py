"""Motion on frozen features of frames: which frames of a clip are taken, and heads that read them in order.

A backbone of images sees one frame at a time, and its features of a clip are the same in any order. What a
clip shows beyond its frames has to come from the head: dinokit.video.probe.
"""
