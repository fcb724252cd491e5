"""Evaluation of methods: items to run them on, judges that measure the results, summaries and plots."""
