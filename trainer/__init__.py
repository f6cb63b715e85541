"""Recovery after pruning: what `accelerate launch` starts."""
