"""Plans: the program that a command would run, compiled at full size for hardware that is not here."""
