"""The noise predictor: the UNet to read, and its optimized forms for inference. It knows no diffusion."""
