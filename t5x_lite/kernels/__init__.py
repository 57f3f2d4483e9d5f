"""Ways to compute the same attention; each is tested against the reference."""
