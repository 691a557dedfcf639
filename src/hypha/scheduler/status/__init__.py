"""A job as people and metrics see it: snapshot, history, figures of each round."""
