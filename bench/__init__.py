"""Measurements: `python -m bench step` times the stages of a training step on this machine."""
