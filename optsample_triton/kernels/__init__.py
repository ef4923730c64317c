"""The Triton kernels. Importing this package imports triton; nothing outside it does."""
