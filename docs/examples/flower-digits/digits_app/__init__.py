"""A Flower app of handwritten digits."""
