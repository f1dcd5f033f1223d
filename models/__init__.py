"""Full-precision diffusion models: denoisers, schedules, samplers, checkpoint loading."""
