"""`python -m pertoken` is `pertoken`."""

from pertoken.cli import command

command()
