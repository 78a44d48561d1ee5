"""The noise predictor: the UNet to read, and the forms it takes for inference. It knows no diffusion."""
