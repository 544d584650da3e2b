"""What a run will need, from its recipe alone: parameters, memory, speed. Nothing here imports torch."""
