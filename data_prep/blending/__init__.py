"""Plan and write a blend: which document goes where, and how it gets there."""
