"""A LoRA file becomes a checked LoraAdapter on the CPU."""
