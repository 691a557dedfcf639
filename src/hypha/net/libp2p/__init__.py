"""All that wraps or repairs py-libp2p 0.8.1. Each module can go when the library does what it does."""
