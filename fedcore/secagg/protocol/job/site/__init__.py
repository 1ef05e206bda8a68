"""A whole job at a site: `machine.py` passes each event to the parts in the modules beside it."""
