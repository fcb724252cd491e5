"""What several pipelines use: the parts of diffusers' pipelines, checks of arguments, the tasks of visual ICL."""
