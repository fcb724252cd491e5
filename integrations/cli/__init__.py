"""The command line: one file per command, `shared/` for what several of them use."""
