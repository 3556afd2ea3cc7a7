"""Adapters: what is trained in place of, or beside, the base weights."""
