"""How good the images of a checkpoint are, by sampler and number of network evaluations; a command of its own."""
