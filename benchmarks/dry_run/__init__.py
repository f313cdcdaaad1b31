"""FLUX.1 at its full size on a CUDA device that is not there: what can be proven without one."""
