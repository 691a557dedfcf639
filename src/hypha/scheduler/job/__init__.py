"""A job from its configuration to its published model.

:mod:`run` takes it through its :mod:`states`: ``Preparing``, then ``Opened`` (by :mod:`opening`), then
``WorkingJob`` (:mod:`working`), to one of its ends (:mod:`ending`).
"""
