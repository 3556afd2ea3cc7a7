"""Losses: (prediction, target) to one number per sample."""
