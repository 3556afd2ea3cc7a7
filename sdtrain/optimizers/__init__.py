"""Optimizers: parameter groups to a torch optimizer."""
