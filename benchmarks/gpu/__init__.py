"""`script/bench gpu`: ours beside its peers and beside the speed of the machine's own kernels, on one GPU."""
