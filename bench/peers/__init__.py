"""Unstir beside other inference servers, all with the same network: ``make bench-peers``."""
