"""Post-training quantization of denoisers. Knows nn.Module and timesteps, no files of images.

The way of a layer: `layers.CalibLayer` (float weight, learnable rounding and activation scales)
wraps an nn.Conv or nn.Linear while `calibrate.py` runs; `deploy()` turns it into
`layers.QuantLayer`, plain integer buffers, which `packed` writes and reads.
"""
