"""The benchmark ``distances``: drawn images against a set of true ones."""
