"""`make gpu-check`: tests of the CUDA path on this machine's card, and measurements of it."""
