"""Adversaries against what each party really sees under a run's own plan (`fedcore attack`)."""
