"""Methods against forgetting that act on weights: they are held back, or merged."""
