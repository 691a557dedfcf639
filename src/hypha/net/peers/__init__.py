"""Who is connected with this node, who may be, and how connections are made, bounded and given up."""
