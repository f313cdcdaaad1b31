"""Measurements, and the figures that they gave."""
