"""From a task's name and files to a model, and from the columns of a batch to its loss.

- Tied weights: one decision: where the file holds several matrices for one that the configuration ties, they
  are several, for the parameter server and the trainers alike, and the export says so.
- Weights that do not fit: nothing is trained from scratch beside a weight file: keys that are missing or were
  not used, a common prefix, forms that are not read and missing shards are errors that name them; only a
  fresh head is allowed, and told.
- Buffers: are looked up by name each time; a constant one may be infinite or complex, one that training makes
  so is ``NotFinite``.
- What is exported: every file of the model's source but weights, hidden files and those of other programs'
  training; ``config.json`` is written anew.
- Rows of different lengths: are padded where batches are joined, with the token and on the side that the
  tokenizer or the configuration names; replay joins them with the same code.
"""
