"""What a site computes, and what a released sum leads to. Torch lives here."""
