"""What a person sees of a run while it goes on: progress, pictures and texts."""
