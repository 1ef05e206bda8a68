"""What happens to a released sum: the server optimiser's step, and the range of the next round."""
