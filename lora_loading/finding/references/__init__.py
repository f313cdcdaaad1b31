"""How LoRAs are named: a module a service, with its forms, its reference and its `parse`. No network, no torch."""
