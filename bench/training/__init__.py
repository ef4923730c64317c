"""What learning from q* does to a small language model: docs/tutorial.md."""
