"""The parts of scripts/benchmark.py.

plan: which cells; ablations: their variants; full: what full precision gives, once for all cells;
cells: calibrate, sample and measure one; record: what is there already; measure, scoring: the
numbers; tables, plots: how they are shown; environment: where it ran.

speed, speed_models, speed_tables: seconds and memory, with random weights (--speed).
"""
