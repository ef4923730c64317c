"""Adapters to other frameworks. Importing one imports its framework; nothing else in the package does."""
