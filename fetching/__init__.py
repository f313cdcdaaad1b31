"""Bytes from the network to the disk: guarded HTTP, fast downloads, what a file is, where it is kept."""
