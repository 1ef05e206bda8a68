"""Differential privacy with the noise inside the protected sum: sampler, accounting, and what a plan states of it."""
