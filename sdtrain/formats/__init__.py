"""File formats of models: how tensors and configs lie on disk."""
