"""Quantized denoisers in the files of other runtimes, and what these compute."""
