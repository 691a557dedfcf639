"""Between an executor and the network: HTTP on a private Unix socket, and what waits there."""
