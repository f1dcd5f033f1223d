"""The report of one run folder as a page, see scripts/report.py.

run_folder reads what is there, measurements runs the networks, figures and panels draw, sections
put words and pictures together, page makes HTML of them.
"""
