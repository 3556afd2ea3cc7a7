"""Encoded pictures and prompts, kept on disk so that no run encodes them a second time."""
