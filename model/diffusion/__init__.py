"""Diffusion: noise schedules, samplers and inversions compiled to plans, and the machine that executes them."""
