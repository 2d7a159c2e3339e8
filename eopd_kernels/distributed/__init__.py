"""Many ranks: a vocabulary that is spread over them, parameters that are, and one denominator for all."""
