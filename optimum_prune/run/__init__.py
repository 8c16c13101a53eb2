"""A plan carried out: pruned, recovered, converted; resumed; a whole folder or none."""
