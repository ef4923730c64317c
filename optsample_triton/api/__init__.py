"""What users call, each function with its arguments checked: the native layer on logits, and the drop-in layer."""
