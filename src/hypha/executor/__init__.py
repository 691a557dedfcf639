"""The executors, which hold the tensors: child processes of a worker (training, parameter server), and
programs that people run (replay, evaluate). How they wait is in ``threads.py``.
"""
