"""The parts of scripts/benchmark.py.

methods: the command without --speed; plan: which cells; ablations, studies: their variants; full:
what full precision gives, once for all cells; cells: calibrate, sample and measure one; record:
what is there already; measure, scoring: the numbers; tables, leads, plots: how they look;
environment: where it ran.

speed: the command with --speed; speed_models, speed_tables: seconds and memory of random weights.
"""
