"""What a recipe would do and cost, and every check before a weight is read."""
