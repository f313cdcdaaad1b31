"""The world that the embedded model draws, and how it is trained and judged."""
