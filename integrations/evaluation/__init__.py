"""How well a method does: sets of items, judges, tables and figures."""
