"""Which images may leave: detectors that judge them, and one guard under which doubt means no."""
