"""What programs need on chips that nobody has to have: they are compiled as for a run, and not executed."""
