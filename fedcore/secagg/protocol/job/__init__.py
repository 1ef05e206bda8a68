"""A whole job as two machines: what the coordinator does, and what a site does."""
