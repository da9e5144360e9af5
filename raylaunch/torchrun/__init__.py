"""What torchrun offers, on Ray."""
