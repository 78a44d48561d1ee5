"""The batching engine: many trajectories, one network, one thread. It knows plans and rows, and nothing of HTTP."""
