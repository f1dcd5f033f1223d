"""From a full-precision denoiser to a deployed one."""
