"""What a LoRA is called -> where its file lies -> the file, held in the cache."""
