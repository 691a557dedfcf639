"""The inner loop of DiLoCo: batches, the inner optimizer, one device or several.

- Batch size: ``batch_size``, else 16; where ``resources.worker`` says what a sample needs and a worker offers
  at least twice that, as many as fit; at most ``max_batch_size``.
- An executor with several devices: ``executor/inner/process_group.py``: rank 0 speaks to the bridge, the
  others follow (``spread_model.py``); a batch is the executor's, its gradients are added up over ranks.
- A batch that does not fit: is halved and its gradients added up, larger ones are tried again later
  (``executor/inner/batch_size.py``); batch sizes and steps in the ledger stay true. Growing the batch
  itself is another training, and off by default.
"""
