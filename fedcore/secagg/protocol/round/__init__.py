"""One protected round as two machines: what a site does, and what the coordinator does."""
