"""What protection costs, measured: size and seconds beside CKKS, and the memory of a fold.

Benchmarks are not tests: each returns raw JSON with its configuration and machine; thresholds are
checked elsewhere.
"""
