"""The one exception type for mistakes a user can make and mend."""


class UserError(ValueError):
    """A wrong config value, file or combination. The text names the key or file, the value and the fix.

    Entry points print it as one `error: ...` line without a traceback and exit with status 2.
    """
