"""What a GPU makes of dwakd, in one command: `make gpu`."""
