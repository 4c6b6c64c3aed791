"""Which checkpoint rule would have picked the best checkpoint in given runs, and how surely."""
