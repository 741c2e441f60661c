"""Which configuration a call runs with: selection, the files of tuned entries, the log of shapes, the explanation."""
