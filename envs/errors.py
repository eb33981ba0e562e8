"""The one error that means: whoever runs this can mend it."""


class UserError(ValueError):
    """Bad input. The message names what is wrong, its value and the remedy; it is shown as is."""
