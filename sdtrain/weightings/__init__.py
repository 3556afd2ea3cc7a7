"""Weightings: signal-to-noise ratio to one factor per sample."""
