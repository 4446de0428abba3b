"""Blocks on a CUDA GPU: pooling and attention in windows in Triton, where libraries are slow. All else is the plain module."""
