"""Load the FLUX.1 models, place them in memory, and generate images in both precisions."""
