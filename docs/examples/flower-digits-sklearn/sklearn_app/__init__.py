"""A Flower app of handwritten digits with scikit-learn."""
