"""What learning does to the model, measured: how far it goes from the base, and what updates put at risk."""
