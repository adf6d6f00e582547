"""`python -m nestgen`, for `accelerate launch -m nestgen`."""

from nestgen.cli.main import main

if __name__ == "__main__":  # not in the processes that `nestgen sample --processes` spawns
    main(prog_name="nestgen")
