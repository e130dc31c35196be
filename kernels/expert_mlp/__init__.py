"""The expert MLP in one process and over rows in place: GEMMs by path (Hopper, portable Triton, torch), activations."""
