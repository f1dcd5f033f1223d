"""All that sampling needs of a quantized model: quantizers, layers, denoiser, the packed file."""
