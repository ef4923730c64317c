"""The PyTorch path: CPU, float64, any device without Triton. The same algorithm as the kernels."""
