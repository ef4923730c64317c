"""An executor of the PTX that Triton compiles."""
