"""The same network behind other servers, each set up as well as it can be, and Unstir beside them."""
