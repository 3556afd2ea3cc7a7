"""Fine-tune Stable Diffusion models on a prepared data set."""
