"""The inner loop of DiLoCo: batches, the inner optimizer, one device or several.

- Batch size: ``batch_size``, else 16; where ``resources.worker`` says what a sample needs and a worker offers
  at least twice that, as many as fit; at most ``max_batch_size``.
- An executor with several devices: ``process_group.py``, ``spread_model.py``.
- A batch that does not fit: ``batch_size.py``. Growing the batch itself is another training, and off by
  default.
"""
