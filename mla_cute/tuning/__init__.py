"""Choosing the configuration of a call by measuring: what `mla-cute tune` and tune/autotune.py run.

recipes    shapes from TOML files, from flags and from the log of a server; the order they are tuned in
space      candidate configurations of a shape
search     check, time in interleaved rounds, halve, choose: one shape, against any Measurer
workers    compiling processes, and the measuring process that may hang or crash
device     what runs in the measuring process: pool, graphs, rounds
store      the measurements file
pairs      the entries of a shape timed with uniform and with ragged lengths
session    many shapes under a budget, resumed and interrupted
report     what was won, as text, Markdown and PNG
command    the argparse command line
"""
