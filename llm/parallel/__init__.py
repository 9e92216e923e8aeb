"""Several processes and devices: launching, exchange, sharded optimizers, strategies."""
