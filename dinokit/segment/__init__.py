"""Segmentation by prompts, on frozen features of any backbone: training (dinokit train-head) and prediction.

Reading order: prompts.py (frames and prompts), promptable.py (the network), rounds.py (what it
learns in a step), training.py (the loop), predictor.py (its use); unified.py and questions.py for words and
regions.
"""
