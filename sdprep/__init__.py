"""Curate images into a Hugging Face data set."""
