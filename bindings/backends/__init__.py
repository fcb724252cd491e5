"""The backends, one package each, and the planner that chooses among them."""
