"""A whole job as a site sees it: `machine.py` tells the parts what happens, in which order."""
