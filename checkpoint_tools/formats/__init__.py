"""The two formats, and a model on disk in either, read a tensor at a time."""
