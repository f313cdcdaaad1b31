"""FLUX.1 itself: where its parts come from, and how they turn a request into images."""
