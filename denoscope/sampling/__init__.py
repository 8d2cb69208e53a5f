"""Sampling: one loop over diffusion steps, and guidance that is computed only where it counts."""
