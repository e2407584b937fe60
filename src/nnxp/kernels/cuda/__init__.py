"""Fused bodies for CuPy, in files of the same names as the reference bodies.

There are none yet: every kernel runs its reference body on CuPy, correct and unfused.
"""
