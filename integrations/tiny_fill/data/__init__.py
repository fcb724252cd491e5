"""Training data of the embedded model: photos, drawn subjects, words and canvases made of them."""
