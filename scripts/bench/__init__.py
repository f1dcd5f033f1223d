"""The parts of scripts/benchmark.py.

plan: which cells; ablations: their variants; full: what full precision gives, once for all cells;
cells: calibrate, sample and measure one; measure: the numbers; tables and plots: how they are shown.
"""
