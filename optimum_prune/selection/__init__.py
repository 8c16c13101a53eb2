"""What should go: scores, searches, targets, budgets."""
