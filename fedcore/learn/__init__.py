"""Local learning: a model as one flat vector, training it on a site's rows, scoring it. Torch lives here."""
