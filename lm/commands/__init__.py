"""The subcommands of python -m lm, a file each: its arguments, and a function that takes them and does it."""
