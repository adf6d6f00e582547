"""The command `featurize`: options to a request, a request to one of the folders below. May import all of them."""
