"""The commands, one file each: its docstring is the help, its class the options.

To add the command `metarl NAME`, add a file NAME.py with a dataclass `Name` and a function `name`
that takes it and returns the exit code. The modules in IMPORTS, if there are any, are imported
before the function is called, while Ctrl-C still ends the process at once.
"""
