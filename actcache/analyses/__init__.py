"""One file for each question that a study answers from its tables."""
