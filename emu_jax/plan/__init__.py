"""What a run will need and how fast it will go, on a machine that nobody here owns."""
