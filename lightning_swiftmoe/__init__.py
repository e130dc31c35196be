"""Mixture-of-Experts training on PyTorch Lightning: replicas follow the load, optimizer state never moves."""
