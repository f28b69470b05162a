"""Attacks on a store: each makes a valid store lie, with every checksum right, and says in a docstring how.

An attack is a function ``(Forger) -> None`` of one of the modules here; ``../test_attacks.py`` runs them all. What must
come of each is a named error, at once and before anything large is allocated, and nothing outside the store changed.
"""
