"""The phases of training: what each builds, and how one is run."""
