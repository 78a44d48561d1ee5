"""Training a noise predictor by denoising regression."""
