"""The network of a simulated world: lines, connections, nodes and what they do with each other."""
