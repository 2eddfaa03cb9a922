"""Refreshes the Triton kernels' tuning tables on the GPU at hand: `hybridops tune`."""
