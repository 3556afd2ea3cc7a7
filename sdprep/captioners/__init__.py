"""Sentences for an image: one module a captioner."""
