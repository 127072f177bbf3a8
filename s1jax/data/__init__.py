"""From a file of questions, reasoning traces and answers to the rows of one optimiser step."""
