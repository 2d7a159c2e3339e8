"""The loss in trainers of other libraries: one module each, imported only when it is asked for by name."""
