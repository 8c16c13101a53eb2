"""What a step of a recipe is: it prunes, recovers, quantizes or exports."""
