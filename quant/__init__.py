"""Post-training quantization of denoisers. Knows nn.Module and timesteps, no files of images.

    core          what every part shares
    runtime       deployed layers and the quantized file: all that sampling needs
    backends      faster execution of deployed layers
    calibration   how a denoiser becomes a deployed one

Each room imports those above it in this list only, and none imports calibration.
"""
