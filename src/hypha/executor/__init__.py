"""The executors: child processes of a worker that hold the tensors (training, parameter server, replay)."""
