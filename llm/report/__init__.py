"""Reports, tables and plots from the files of runs."""
