"""Training data of the tiny model: photos, drawn subjects, prompts, and the diptychs that combine them."""
