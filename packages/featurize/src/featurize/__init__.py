"""featurize: pictures through a frozen encoder into standardised per-level zarr stores."""
