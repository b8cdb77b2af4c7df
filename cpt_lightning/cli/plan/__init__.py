"""``cpt plan``: what memory a run needs, known before anything is allocated."""
