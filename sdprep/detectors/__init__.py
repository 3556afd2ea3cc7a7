"""Boxes in an image: one module a detector."""
