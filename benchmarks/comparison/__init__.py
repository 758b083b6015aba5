"""The same small models through pergrad and its peers, against one backward pass per example."""
