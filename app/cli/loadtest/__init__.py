"""``unstir loadtest``: load for a server of any make, and the latencies that its clients see."""
