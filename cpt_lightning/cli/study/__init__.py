"""``cpt study``: a list of arms, each with several seeds, run and compared."""
