"""What every part shares: timesteps, the affine quantization, layer geometry, settings."""
