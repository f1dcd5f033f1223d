"""The phases of calibration: what each does to the model of a job, see calibration.py."""
