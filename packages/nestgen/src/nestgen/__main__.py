"""`python -m nestgen`, for `accelerate launch -m nestgen`."""

from nestgen.cli import main

main(prog_name="nestgen")
