"""The papers' tables, trained anew: ``python -m bench.tables pemn``."""
