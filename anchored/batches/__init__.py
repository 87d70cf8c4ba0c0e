"""From pairs to logps: render to token ids, share what answers share, pack rows, run the model, score the answers."""
