"""Does the suite notice? A mutant is the package with one thing broken; ``python -m tests.mutants`` runs them all."""
