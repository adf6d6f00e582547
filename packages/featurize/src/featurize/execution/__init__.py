"""How tasks are carried out: one interface (`tasks.Run`), and behind it this process, local processes or a Dask cluster.

`engine` chooses. Besides: `devices` (cores, GPUs), `interrupt` (Ctrl-C), `progress`. May import errors and io.
"""
