"""Training data: sources of text, packing into rows, loaders of step batches."""
