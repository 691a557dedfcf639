"""A job from its configuration to its published model: :mod:`run` has it opened (:mod:`opening`), has it work
(:mod:`working`), and brings it to one of its ends (:mod:`ending`).
"""
