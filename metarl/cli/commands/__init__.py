"""Commands, one file each: its docstring is the help, its dataclass the options.

To add the command `metarl NAME`, add a file NAME.py with a dataclass `Name` and a function `name`.
The function takes the dataclass and returns the exit code. Modules in IMPORTS, if any, are imported
before the function is called, while Ctrl-C still ends the process at once.
"""
