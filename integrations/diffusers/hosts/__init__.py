"""One file per architecture: its processor, and where its attention is. host.py says how to add one."""
