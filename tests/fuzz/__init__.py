"""Fuzzing: mutated files, images, references and answers, from fixed seeds; `script/fuzz` runs the full counts."""
