"""Studies: claims about trainings, the runs that test them, and the verdicts."""
