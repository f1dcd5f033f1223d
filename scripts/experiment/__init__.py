"""What calibrate.py and sample_diffusion.py are made of."""
