"""Files of tensors: canonical, hashed in one pass, written over rather than anew."""
