"""``cpt inspect``: what the model will be asked and paid for, looked at before any GPU is."""
