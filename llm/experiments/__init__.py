"""Tools for many runs: the reader of runs, the table, the comparison of two configurations, the queue."""
