"""A site's computations, and the application of released sums. The only package that imports torch."""
