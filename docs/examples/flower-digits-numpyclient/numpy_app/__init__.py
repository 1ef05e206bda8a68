"""A Flower app of handwritten digits, in the older API."""
