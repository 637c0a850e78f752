"""Pretraining: the student, the teacher, and the loop that moves them."""
