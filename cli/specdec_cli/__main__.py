"""`python -m specdec_cli`, for where the `specdec` script is not on the path."""

from specdec_cli.main import run

run()
