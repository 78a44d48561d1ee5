"""What is computed: schedules, plans, the row machine, the network, checkpoints and training.

Nothing in this package knows HTTP, threads or the clock of a server.
"""
