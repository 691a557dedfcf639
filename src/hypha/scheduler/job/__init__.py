"""A job from its configuration to its published model.

:mod:`run` opens the node and the state directory and runs the job in it; :mod:`running` takes it through its
:mod:`states`: ``Preparing``, ``Opened`` (made by :mod:`opening`), then ``WorkingJob`` (:mod:`working`).
"""
