"""A run's largest steps, run before it: ``cpt rehearse``."""
