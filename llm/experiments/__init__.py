"""Tools that look at many runs: the reader of runs, the table, and the comparison of two configurations."""
