"""What several pipelines use: their bases, checks of arguments, the tasks of visual in-context learning."""
