"""Text and conversations as step batches: sources, packing, loaders."""
