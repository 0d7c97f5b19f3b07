"""NeST beside what else could be done: same data, same number of steps, same evaluation, one table."""
