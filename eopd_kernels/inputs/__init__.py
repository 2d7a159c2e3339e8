"""The arguments of a call: every check, every default, and the record that the schedules take."""
