"""Questions about images: records from anywhere, their checks, answers as tokens, and scores."""
