"""A LoRA file -> a LoraAdapter on the CPU, checked."""
