"""What several commands use: options, loading, output, figures."""
