"""Evaluation of a checkpoint: quality of its samples and inversions, by network evaluations."""
