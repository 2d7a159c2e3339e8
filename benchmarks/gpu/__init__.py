"""The acceptance run on a GPU: the tests that need one, then the matrix of sizes beside every installed peer."""
