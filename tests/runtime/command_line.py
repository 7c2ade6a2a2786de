"""Running `hasten ...` in this process."""

from typer.testing import CliRunner

from hasten.cli import app


def run(*arguments, status=0):
    """The result of a command that ends with `status`. Errors that the command line does not show are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def refused(*arguments):
    """The one line on stderr of a command that ends with status 1."""
    (line,) = run(*arguments, status=1).stderr.splitlines()
    return line
