"""The parts of the reference distillation program ``python/distill.py``, usable on their own."""
