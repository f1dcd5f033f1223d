"""Ways of executing a deployed model faster than in floating point."""
