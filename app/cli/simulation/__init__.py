"""``unstir simulate``: scheduling policies on simulated traffic, without a device, threads or a clock."""
