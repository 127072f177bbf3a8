"""What `make demo` runs: this project in miniature, on any machine, with nothing downloaded."""
