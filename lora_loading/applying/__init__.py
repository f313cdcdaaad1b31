"""The model carries exactly one stack of adapters."""
