"""From a task's name and files to a model, and from the columns of a batch to its loss."""
