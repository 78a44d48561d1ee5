"""Measurements that anyone can run again. Every figure is a ratio of things alternated in one run."""
