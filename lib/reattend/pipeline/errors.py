"""The error every command ends with: one clear line and an exit code."""


class CommandError(Exception):
    """Ends the command with `message` on stderr. Exit code 2 means bad input, 1 a failed run."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
