"""Schedules: samples seen to a factor on every learning rate."""
