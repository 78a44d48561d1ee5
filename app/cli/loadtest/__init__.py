"""``unstir bench``: load for a server of any make, and what its clients saw of it."""
