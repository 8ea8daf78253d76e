"""The commands, a module each: a function whose parameters are the options. `cli.py` lists them."""
