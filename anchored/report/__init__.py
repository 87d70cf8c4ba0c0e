"""Run folders in, one page out: what was run, what came of it, and the pairs to look at."""
