"""Diffusion models: schedules, plans, the row machine, the network, checkpoints, training and evaluation.

Nothing in this package knows HTTP, threads or the clock of a server.
"""
