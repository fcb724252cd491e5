"""The composed backend: one vendor attention call with LSE per key segment, merged. Runs on every device."""
