"""Tests, in folders that mirror the source; a package so that they can share doubles."""
