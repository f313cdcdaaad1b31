"""`script/bench gpu`: the dry run's plan with a clock, on a GPU that is there, beside diffusers."""
