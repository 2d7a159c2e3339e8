"""Random calls of the loss, in every layout, dtype and option, against the reference in fp64.

``python -m tests.fuzz --seed 123`` replays one call, ``--seeds 0:20000`` runs many; tests/test_fuzz.py runs the first
few hundred. ``layouts.py`` is how numbers lie in memory, ``tokens.py`` what is said of each token, ``calls.py`` a whole
call, ``truth.py`` what it must give, ``compare.py`` how near it has to be.
"""
