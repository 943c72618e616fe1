"""Presets: one file each, `get_config()` gives the config; its docstring says the command and what to expect."""
